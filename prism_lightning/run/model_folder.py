"""The exported model: one Hugging Face folder of safetensors, configuration and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from prism_lightning.common.devices import device_named, dtype_named
from prism_lightning.common.errors import UserError
from prism_lightning.common.files import CHECKSUMS, folder_integrity_error, partial_folder, write_checksums
from prism_lightning.data.tokenizer import open_tokenizer
from prism_lightning.models import PrismForCausalLM
from prism_lightning.models.portable import auto_map, portable_files
from prism_lightning.run.directory import RunPaths, exported_folder
from prism_lightning.run.fingerprints import model_fingerprint
from prism_lightning.run.hub import CARD

transformers_logging.disable_progress_bar()


def save_exported(model: PrismForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights, configuration and tokenizer to a folder, completely or not at all, and replace an earlier one."""
    with partial_folder(folder) as partial:
        _save_pretrained(model, tokenizer, partial)
        write_checksums(partial)


def save_shareable(model: PrismForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, card: str) -> None:
    """Write a folder as `save_exported` does, with what other programs and people need.

    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` then loads it without this package; the
    verbs of this package never execute the code in a folder.

    Args:
        model, tokenizer: to write.
        folder: to write or replace.
        card: content of README.md.
    """
    with partial_folder(folder) as partial:
        _save_pretrained(model, tokenizer, partial)
        config = partial / "config.json"
        content = json.loads(config.read_text(encoding="utf-8")) | {"auto_map": auto_map()}
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, source in portable_files().items():
            (partial / name).write_text(source, encoding="utf-8")
        (partial / CARD).write_text(card, encoding="utf-8")
        write_checksums(partial)


def save_native(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model of Hugging Face's own and its tokenizer to a folder, completely or not at all."""
    with partial_folder(folder) as partial:
        _save_pretrained(model, tokenizer, partial)


def _save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    assert model.generation_config is not None
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_exported(
    path: Path, device: str = "cpu", dtype: str = "fp32"
) -> tuple[PrismForCausalLM, PreTrainedTokenizerFast]:
    """Return the model (in eval mode) and the tokenizer of an exported folder or of a run directory.

    Weights are read from safetensors alone and converted to fp32; a pickle among the files is never opened.

    Args:
        path: the folder.
        device: auto, cpu, cuda, cuda:N or mps, see `device_named`.
        dtype: number type of the decoder: fp32, or bf16, see `PrismForCausalLM.narrow_decoder`.

    Raises:
        UserError: no such folder, device or type, no model of this package, damaged files, or weights that are not
            finite.
    """
    torch_device, decoder_dtype = device_named(device), dtype_named(dtype)
    folder = exported_folder(path)
    if folder is None:
        raise UserError(
            f"{path} holds no exported model: give a run directory that `fit` has finished, or its model folder"
        )
    _check_files(folder)
    try:
        model = PrismForCausalLM.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32
        )
        tokenizer = open_tokenizer(folder)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{folder} cannot be loaded: {' '.join(str(error).split())[:200]}; export it anew with fit"
        ) from error
    vars(model.config).pop("auto_map", None)  # It names the files of a shared folder, and would be saved elsewhere.
    check_finite(model.state_dict(), folder)
    if decoder_dtype != torch.float32:
        model.narrow_decoder(decoder_dtype, model_fingerprint(model))  # takes a second per GB
    return model.eval().to(torch_device), tokenizer  # type: ignore[arg-type]


def _check_files(folder: Path) -> None:
    try:
        damaged = folder_integrity_error(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): give yourself read access") from error
    if damaged:
        of_run = folder == RunPaths(folder.parent).model
        fix = f"remove {folder} and run the same fit" if of_run else "export it again"
        raise UserError(f"{damaged}: {fix}; if the file was changed on purpose, remove {folder / CHECKSUMS}")


def check_finite(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise UserError if a weight is NaN or infinite."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path}: {name} holds values that are not finite: use an earlier checkpoint or train anew")
