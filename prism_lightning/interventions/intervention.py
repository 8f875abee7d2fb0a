"""An intervention: factors on prototypes, as a small file that every verb applies alike.

{"format": 1, "model": "0f3a…", "factors": {"318": 0.0}, "tokens": null, "origin": {"verb": "suppress", …}}

`model` is the fingerprint of the weights it was made for, `tokens` lists those whose logits are meant (null: all), and
`origin` says how it was made, for people.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import read_json, write_json
from prism_lightning.common.manifests import listed, mapping, mapping_of, number, optional, problem_in, text, whole
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.steering import Scaling
from prism_lightning.run.fingerprints import model_fingerprint
from prism_lightning.run.model_folder import load_exported, run_directory

FORMAT = 1
FIELDS = {
    "format": whole(),
    "model": text(),
    "factors": mapping_of(number()),
    "tokens": optional(listed(whole())),
    "origin": optional(mapping({"tasks": optional(listed(text()))})),
}
PROTOTYPE = re.compile(r"\d{1,9}", re.ASCII)


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
        found = read_json(path)
        problem = "it is no JSON object" if found is None else problem_in(found, FIELDS)
        if found is None or problem:
            raise UserError(
                f"intervention {path} is none ({problem}): give a JSON object with format {FORMAT}, model, and factors"
                " by prototype"
            )
        if found["format"] != FORMAT:
            raise UserError(f"intervention {path} has format {found['format']}: this version reads format {FORMAT}")
        stray = [name for name in found["factors"] if not PROTOTYPE.fullmatch(name)]
        if stray:
            raise UserError(f"intervention {path} is none ({stray[0][:40]!r} is no prototype): name them by number")
        factors = {int(prototype): float(factor) for prototype, factor in found["factors"].items()}
        tokens = None if found.get("tokens") is None else tuple(found["tokens"])
        return cls(found["model"], Scaling(factors, tokens), found.get("origin") or {})


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


def load_with(
    run: Path, interventions: list[str], device: str = "cpu", dtype: str = "fp32"
) -> tuple[PrismForCausalLM, PreTrainedTokenizerFast]:
    """A model as `load_exported` gives it, with interventions applied; raises as it and `apply` do."""
    model, tokenizer = load_exported(run, device, dtype)
    apply(model, run, interventions)
    return model, tokenizer


@contextmanager
def temporary_scaling(model: PrismForCausalLM, scaling: Scaling) -> Iterator[None]:
    """Apply a scaling on top of the model's own interventions, and take it back at the end."""
    own = model.scalings
    model.intervene(*own, scaling)
    try:
        yield
    finally:
        model.intervene(*own)
