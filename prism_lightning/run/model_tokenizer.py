"""The tokenizer of a pretrained model in its run directory: every verb encodes text with it."""

from __future__ import annotations

from typing import Any

import filelock
from transformers import PreTrainedTokenizerFast

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import partial_folder
from prism_lightning.data.tokenizer import load_tokenizer, open_tokenizer, tokenizer_size
from prism_lightning.models.pretrained import tokenizer_location
from prism_lightning.run.directory import RunDirectory, RunPaths
from prism_lightning.run.fingerprints import tokenizer_fingerprint


def model_tokenizer(source: str, gguf_file: str | None = None) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a pretrained model; of an adapter without one, that of its base.

    Raises:
        UserError: as `load_tokenizer`.
    """
    return load_tokenizer(tokenizer_location(source), gguf_file)


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int, name: str) -> None:
    """Raise UserError if a tokenizer has ids that its model does not know."""
    size = tokenizer_size(tokenizer)
    if size > vocab_size:
        raise UserError(
            f"the tokenizer of {name} has {size} tokens, its model {vocab_size}: give a model with the"
            " tokenizer that it was trained with"
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, run: RunDirectory) -> None:
    """Write the tokenizer of a pretrained model into a run directory, unless a run has begun there with its own.

    Several processes of one run may call this; the first one writes.
    """
    folder = run.paths.tokenizer
    run.create()
    with filelock.FileLock(folder.with_suffix(".lock")):
        if folder.is_dir() and (run.has_work() or _contents(open_tokenizer(folder)) == _contents(tokenizer)):
            return
        with partial_folder(folder) as partial:
            tokenizer.save_pretrained(partial)


def _contents(tokenizer: PreTrainedTokenizerFast) -> tuple[Any, ...]:
    """Return what decides how a tokenizer encodes documents and chats."""
    return tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token


def choose_tokenizer(model: dict[str, Any], requested: str | None, vocab_size: int, run: RunDirectory) -> str | None:
    """Return `data.tokenizer` for `fit`: a pretrained model's own, written into the run directory.

    A run that has begun uses what it has. The model's files are then not read.

    Args:
        model: the model's settings, of which `pretrained` and `gguf_file` matter.
        requested: `data.tokenizer` of the recipe.
        vocab_size: number of ids that the model knows.
        run: the run directory.

    Raises:
        UserError: the model's tokenizer cannot be loaded or has more ids than the model, or `requested` has another
            vocabulary.
    """
    source = model.get("pretrained")
    if source is None:
        return requested
    if run.has_work() and run.paths.tokenizer.is_dir():
        return requested or str(run.paths.tokenizer)
    tokenizer = model_tokenizer(source, model.get("gguf_file"))
    check_vocabulary(tokenizer, vocab_size, source)
    if requested is None:
        save_tokenizer(tokenizer, run)
        return str(run.paths.tokenizer)
    if tokenizer_fingerprint(load_tokenizer(requested)) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"data.tokenizer {requested} has another vocabulary than the tokenizer of model {source}: leave"
            " data.tokenizer out"
        )
    return requested


def chosen_tokenizer(model: dict[str, Any], requested: str | None, paths: RunPaths) -> str | None:
    """Return `data.tokenizer` for verbs on a run that `choose_tokenizer` has begun.

    Raises:
        UserError: `fit` has not begun.
    """
    if model.get("pretrained") is None or requested is not None:
        return requested
    if not paths.tokenizer.is_dir():
        raise UserError(f"{paths.root} holds no run of a pretrained model: run fit first, or correct --run.dir")
    return str(paths.tokenizer)
