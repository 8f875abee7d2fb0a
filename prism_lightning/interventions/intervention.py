"""An intervention: factors on prototypes, as a small file that every verb applies alike.

{"format": 1, "model": "0f3a…", "factors": {"318": 0.0}, "tokens": null, "origin": {"verb": "suppress", …}}

`model` is the fingerprint of the weights it was made for, `tokens` lists those whose logits are meant (null: all), and
`origin` says how it was made, for people.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from prism_lightning.common.files import write_json
from prism_lightning.attribution.identity import model_fingerprint
from prism_lightning.errors import UserError
from prism_lightning.exported import load_exported, run_directory
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.steering import Scaling

FORMAT = 1


@dataclass
class Intervention:
    """Factors on the terms of some prototypes in the logits.

    Attributes:
        model: fingerprint of the weights.
        scaling: the factors, and the tokens whose logits are meant.
        origin: how it was made.
    """

    model: str
    scaling: Scaling
    origin: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        factors = {str(prototype): factor for prototype, factor in sorted(self.scaling.factors.items())}
        content = {"format": FORMAT, "model": self.model, "factors": factors, "tokens": self.scaling.tokens}
        write_json(path, content | {"origin": self.origin})

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
            tokens = None if found.get("tokens") is None else tuple(int(token) for token in found["tokens"])
            model, known = str(found["model"]), found["format"] == FORMAT
            origin = dict(found.get("origin", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"intervention {path} is none ({type(error).__name__}: {str(error)[:80]}): give a JSON object with"
                f" format {FORMAT}, model, and factors by prototype"
            ) from error
        if not known:
            raise UserError(f"intervention {path} has format {found['format']!r}: this version reads format {FORMAT}")
        return cls(model, Scaling(factors, tokens), origin)


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
    fingerprint, scalings = model_fingerprint(model), list(model.scalings)
    for path in (located(run, name) for name in names):
        found = Intervention.read(path)
        if found.model != fingerprint:
            raise UserError(
                f"intervention {path} was made for model {found.model}, this one is {fingerprint}: make it anew with"
                " `suppress` or `calibrate`"
            )
        scalings.append(found.scaling)
    model.intervene(*scalings)


def load_with(run: Path, interventions: list[str]) -> tuple[PrismForCausalLM, PreTrainedTokenizerFast]:
    """A model as `load_exported` gives it, with interventions applied; raises as it and `apply` do."""
    model, tokenizer = load_exported(run)
    apply(model, run, interventions)
    return model, tokenizer
