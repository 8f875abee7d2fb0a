"""The methods that are compared, each behind `benchmarks.attribution.task.Method`, by the name a YAML file gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from benchmarks.attribution.methods.ekfac import EkFac
from benchmarks.attribution.methods.gradient_index import GradientIndex
from benchmarks.attribution.methods.head import Head
from benchmarks.attribution.methods.prototypes import Prototypes
from benchmarks.attribution.methods.simple import Bm25, HiddenCosine, Random
from benchmarks.attribution.methods.target_match import TargetKernel, TargetMatch
from benchmarks.attribution.methods.trak import Trak
from benchmarks.attribution.task import Method, Task
from prism_lightning.common.errors import UserError, nearest
from prism_lightning.models import PrismForCausalLM

KINDS = {
    "prototypes": Prototypes,
    "target_match": TargetMatch,
    "target_kernel": TargetKernel,
    "ekfac": EkFac,
    "head": Head,
    "trak": Trak,
    "gradient_index": GradientIndex,
    "cosine": HiddenCosine,
    "bm25": Bm25,
    "random": Random,
}


def make(
    task: Task,
    folder: Path,
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    checkpoints: Sequence[PrismForCausalLM] = (),
) -> Method:
    """A method by its settings, `kind` among them; `several` asks for all checkpoints.

    Raises:
        UserError: an unknown kind or setting, or no checkpoints where there should be several.
    """
    settings = dict(settings)
    kind = settings.pop("kind", None)
    if kind not in KINDS:
        raise UserError(f"method kind {kind!r}: {nearest(str(kind), KINDS)}")
    if kind == "bm25":
        settings["tokenizer"] = tokenizer
    if settings.pop("several", False):
        if len(checkpoints) < 2:
            raise UserError(f"method of kind {kind}: several checkpoints are asked for, and {len(checkpoints)} given")
        settings["checkpoints"] = list(checkpoints)
    try:
        return KINDS[kind](task, folder, **settings)  # type: ignore[abstract]
    except TypeError as error:
        raise UserError(f"method of kind {kind}: {error}") from error
