"""The methods that are compared, by the name that a YAML file gives them as `kind`.

To add a baseline, write a file in `methods/` with a subclass of `benchmarks.attribution.task.Method`, and add one line
to KINDS. The class takes `(task, folder, **settings)`; its settings are then those of the YAML file. A class whose
`__init__` has a parameter `tokenizer` is given the corpus's tokenizer. A method that reads posting lists should extend
`methods.lists.ListMethod`, so that the report says what share of the training tokens a query reads. COLOURS in
`plots.py` may give the kind a colour of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from benchmarks.attribution.task import Method, Task
from prism_lightning.common.errors import UserError, nearest
from prism_lightning.models import PrismForCausalLM

# By kind: module in `benchmarks.attribution.methods`, and class.
KINDS = {
    "prototypes": "prototypes.Prototypes",
    "target_match": "target_match.TargetMatch",
    "target_kernel": "target_match.TargetKernel",
    "ekfac": "ekfac.EkFac",
    "head": "head.Head",
    "trak": "trak.Trak",
    "gradient_index": "gradient_index.GradientIndex",
    "cosine": "simple.HiddenCosine",
    "bm25": "simple.Bm25",
    "random": "simple.Random",
}


def method_class(kind: object) -> type[Method]:
    """Return the class of a kind of method.

    Raises:
        UserError: an unknown kind.
    """
    if kind not in KINDS:
        raise UserError(f"method kind {kind!r}: {nearest(str(kind), KINDS)}")
    module, name = KINDS[str(kind)].split(".")
    loaded: type[Method] = getattr(import_module(f"benchmarks.attribution.methods.{module}"), name)
    return loaded


def make(
    task: Task,
    folder: Path,
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    checkpoints: Sequence[PrismForCausalLM] = (),
) -> Method:
    """Make a method from its settings, `kind` among them; the setting `several` passes it all checkpoints.

    Raises:
        UserError: an unknown kind or setting, or too few checkpoints for `several`.
    """
    settings = dict(settings)
    kind = settings.pop("kind", None)
    method = method_class(kind)
    if "tokenizer" in inspect.signature(method).parameters:
        settings["tokenizer"] = tokenizer
    if settings.pop("several", False):
        if len(checkpoints) < 2:
            raise UserError(
                f"method of kind {kind}: `several` needs at least 2 checkpoints, there are {len(checkpoints)}"
            )
        settings["checkpoints"] = list(checkpoints)
    try:
        return method(task, folder, **settings)
    except TypeError as error:
        raise UserError(f"method of kind {kind}: {error}") from error
