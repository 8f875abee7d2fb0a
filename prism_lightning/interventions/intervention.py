"""Interventions: factors on prototypes, in a small file that every verb applies in the same way.

{"format": 1, "model": "0f3a…", "factors": {"318": 0.0}, "tokens": null, "origin": {"verb": "suppress", …}}

`model` is the fingerprint of the weights that the factors are for. `tokens` lists the tokens whose logits are changed;
null means all. `origin` records for people how the factors were found.
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
from prism_lightning.run.directory import RunPaths
from prism_lightning.run.fingerprints import model_fingerprint
from prism_lightning.run.model_folder import load_exported

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
        model: Fingerprint of the weights.
        scaling: The factors, and the tokens whose logits are changed.
        origin: How the factors were found.
    """

    model: str
    scaling: Scaling
    origin: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the file; an interruption leaves no part of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        factors = {str(prototype): factor for prototype, factor in sorted(self.scaling.factors.items())}
        content = {"format": FORMAT, "model": self.model, "factors": factors, "tokens": self.scaling.tokens}
        write_json(path, content | {"origin": self.origin})

    @classmethod
    def read(cls, path: Path) -> Intervention:
        """Read a file.

        Raises:
            UserError: there is no such file, or it is not an intervention.
        """
        if not path.is_file():
            raise UserError(f"intervention {path}: no such file; `suppress` and `calibrate` write interventions")
        content = read_json(path)
        problem = "it is no JSON object" if content is None else problem_in(content, FIELDS)
        if content is None or problem:
            raise UserError(
                f"{path} is no intervention ({problem}): give a JSON object with format {FORMAT}, model, and factors by"
                " prototype"
            )
        if content["format"] != FORMAT:
            raise UserError(f"intervention {path} has format {content['format']}: this version reads format {FORMAT}")
        invalid = [name for name in content["factors"] if not PROTOTYPE.fullmatch(name)]
        if invalid:
            raise UserError(
                f"{path} is no intervention ({invalid[0][:40]!r} is no prototype): give prototypes by number"
            )
        factors = {int(prototype): float(factor) for prototype, factor in content["factors"].items()}
        tokens = None if content.get("tokens") is None else tuple(content["tokens"])
        return cls(content["model"], Scaling(factors, tokens), content.get("origin") or {})


def folder_of(run: Path) -> Path:
    """Return RUN/interventions, where `suppress` and `calibrate` write."""
    return RunPaths.of(run).interventions


def located(run: Path, name: str) -> Path:
    """Return the file of an intervention from its path, or from its name in RUN/interventions."""
    named = folder_of(run) / f"{name}.json"
    return named if named.is_file() and not Path(name).is_file() else Path(name)


def apply(model: PrismForCausalLM, run: Path, names: list[str]) -> None:
    """Apply interventions on top of those that the model was exported with.

    Args:
        model: The run's model.
        run: Run directory, where names are looked up.
        names: Names or paths of interventions.

    Raises:
        UserError: as `Intervention.read` and `PrismForCausalLM.intervene`, or an intervention is for other weights.
    """
    if not names:
        return
    if model.prototypes is None:
        raise UserError(f"{names[0]} scales prototypes, but {run} is dense: give the PRISM model that it was made for")
    fingerprint, scalings = model_fingerprint(model), list(model.scalings)
    for path in (located(run, name) for name in names):
        intervention = Intervention.read(path)
        if intervention.model != fingerprint:
            raise UserError(
                f"intervention {path} was made for model {intervention.model}, this model is {fingerprint}: run"
                " `suppress` or `calibrate` again"
            )
        scalings.append(intervention.scaling)
    model.intervene(*scalings)


def load_with(
    run: Path, interventions: list[str], device: str = "cpu", dtype: str = "fp32"
) -> tuple[PrismForCausalLM, PreTrainedTokenizerFast]:
    """Return a model with interventions applied, and its tokenizer; raises as `load_exported` and `apply` do."""
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
