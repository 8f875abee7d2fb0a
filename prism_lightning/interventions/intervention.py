"""An intervention: factors on prototypes, as a small file that every verb applies alike.

{"format": 1, "model": "0f3a…", "factors": {"318": 0.0}, "origin": {"verb": "suppress", …}}

`model` is the fingerprint of the weights it was made for; `origin` says how it was made, for people.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from prism_lightning.attribution.files import write_json
from prism_lightning.attribution.identity import model_fingerprint
from prism_lightning.errors import UserError
from prism_lightning.exported import load_exported, run_directory
from prism_lightning.models import PrismForCausalLM

FORMAT = 1


@dataclass
class Intervention:
    """logits' = W (z + sum_i (f_i - 1) a_i p_i).

    Attributes:
        model: fingerprint of the weights.
        factors: f_i by prototype; all others have 1.
        origin: how it was made.
    """

    model: str
    factors: dict[int, float]
    origin: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        factors = {str(prototype): factor for prototype, factor in sorted(self.factors.items())}
        write_json(path, {"format": FORMAT, "model": self.model, "factors": factors, "origin": self.origin})

    @classmethod
    def read(cls, path: Path) -> Intervention:
        """Read a file.

        Raises:
            UserError: no such file, or not an intervention.
        """
        if not path.is_file():
            raise UserError(f"intervention {path}: no such file; `suppress` and `calibrate` write them")
        try:
            found = json.loads(path.read_text())
            factors = {int(prototype): float(factor) for prototype, factor in found["factors"].items()}
            model, known = str(found["model"]), found["format"] == FORMAT
            origin = dict(found.get("origin", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"intervention {path} is none ({type(error).__name__}: {str(error)[:80]}): give a JSON object with"
                f" format {FORMAT}, model, and factors by prototype"
            ) from error
        if not known:
            raise UserError(f"intervention {path} has format {found['format']!r}: this version reads format {FORMAT}")
        return cls(model, factors, origin)


def composed(interventions: list[dict[int, float]]) -> dict[int, float]:
    """One after the other: factors of the same prototype are multiplied, so that what is removed stays removed."""
    prototypes = {prototype for factors in interventions for prototype in factors}
    return {p: math.prod(factors.get(p, 1.0) for factors in interventions) for p in sorted(prototypes)}


def folder_of(run: Path) -> Path:
    """RUN/interventions, where `suppress` and `calibrate` write."""
    return run_directory(run) / "interventions"


def located(run: Path, name: str) -> Path:
    """The file of an intervention, given by its path or by its name in RUN/interventions."""
    named = folder_of(run) / f"{name}.json"
    return named if named.is_file() and not Path(name).is_file() else Path(name)


def apply(model: PrismForCausalLM, run: Path, names: list[str]) -> None:
    """Apply interventions, on top of the model's own if it was exported with some.

    Args:
        model: of the run.
        run: where names are looked up.
        names: or paths.

    Raises:
        UserError: as `Intervention.read` and `PrismForCausalLM.intervene`, or one that was made for other weights.
    """
    if not names:
        return
    if model.prototypes is None:
        raise UserError(f"{names[0]} scales prototypes, and {run} is dense: give the PRISM model it was made for")
    fingerprint, factors = model_fingerprint(model), [model.factors]
    for path in (located(run, name) for name in names):
        found = Intervention.read(path)
        if found.model != fingerprint:
            raise UserError(
                f"intervention {path} was made for model {found.model}, this one is {fingerprint}: make it anew with"
                " `suppress` or `calibrate`"
            )
        factors.append(found.factors)
    model.intervene(composed(factors))


def load_with(run: Path, interventions: list[str]) -> tuple[PrismForCausalLM, PreTrainedTokenizerFast]:
    """A model as `load_exported` gives it, with interventions applied; raises as it and `apply` do."""
    model, tokenizer = load_exported(run)
    apply(model, run, interventions)
    return model, tokenizer
