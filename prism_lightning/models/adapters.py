"""Adapters of peft that were trained elsewhere: opened from a folder and merged into the weights of their base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prism_lightning.common.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter of peft."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_base(folder: Path) -> str:
    """Return the hub id or folder of the model that an adapter belongs to.

    Raises:
        UserError: a damaged configuration, or weights that are no safetensors.
    """
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise UserError(
            f"adapter {folder} names no base model in {ADAPTER_CONFIG}: save it with peft's save_pretrained"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"adapter {folder} has no {ADAPTER_WEIGHTS}: save it as safetensors; pickles are not opened")
    return base


@torch.no_grad()
def with_adapter_merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return a model with an adapter's low-rank products added to its weights.

    Args:
        model: the adapter's base, in fp32; it is changed in place.
        folder: written by peft's save_pretrained, with safetensors.

    Raises:
        UserError: no peft, a damaged adapter, or one of a model with other layers or sizes.
    """
    peft = import_peft()
    adapter_base(folder)
    try:
        with quiet():
            adapted = peft.PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # shapes, names and files raise different types
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"adapter {folder} does not fit model {model.config.model_type}: {cause}") from error
    expected, stored = set(peft.get_peft_model_state_dict(adapted)), _stored_names(folder)
    if expected != stored:
        raise UserError(
            f"adapter {folder} is of another base: its {len(stored)} tensors do not match the {len(expected)} that this"
            " model needs; give the model that it was trained on"
        )
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.peft_config[adapted.active_adapter].peft_type.value
        raise UserError(f"adapter {folder} ({kind}) cannot be merged into weights: give one of low rank, such as LoRA")
    with quiet():
        return adapted.merge_and_unload(safe_merge=True).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence peft's warnings: of settings that it corrects, and of tensors that are compared here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _stored_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        return set(file.keys())


def import_peft() -> Any:
    """Return the module peft; raises UserError with the command that installs it."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError("adapters need the package peft: pip install 'prism_lightning[pretrained]'") from error
    return peft
