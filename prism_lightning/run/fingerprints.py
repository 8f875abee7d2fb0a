"""Fingerprints that tie an index to its model, tokenizer and corpus."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerFast

from prism_lightning.common.errors import UserError
from prism_lightning.data.integrity import DamagedDataError, read_prepared
from prism_lightning.models import PrismForCausalLM

if TYPE_CHECKING:
    from prism_lightning.data.store import TokenStore


def model_fingerprint(model: PrismForCausalLM) -> str:
    """Return 16 hexadecimal digits that identify a model's stored weights, whatever type they were loaded in."""
    if model.stored_fingerprint is not None:
        return model.stored_fingerprint
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return 16 hexadecimal digits that identify a tokenizer's vocabulary, the token of every id."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.blake2b(repr(vocabulary).encode(), digest_size=8).hexdigest()


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, store: TokenStore) -> None:
    """Raise UserError if the corpus was not tokenized with the model's tokenizer."""
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(store.tokenizer):
        raise UserError(
            f"the model's tokenizer is not the one that {store.folder} was prepared with:"
            " index the corpus that this model was trained on"
        )


def check_context(block_size: int, model: PrismForCausalLM) -> None:
    """Raise UserError if blocks are longer than a trained model's context."""
    if block_size > model.config.context_length:
        raise UserError(
            f"data.block_size {block_size} is longer than the model's context of {model.config.context_length}:"
            " lower it"
        )


def open_store(manifest: dict[str, Any], folder: Path, verify: bool = True) -> TokenStore:
    """Return the training split that an index was built over.

    Args:
        manifest: of the index.
        folder: of the index, for error messages.
        verify: whether to compare the split's checksums.

    Raises:
        UserError: the split is missing or damaged, or has been replaced by other data.
    """
    from prism_lightning.data.store import TokenStore  # with pyarrow, which `explain` does without

    store_folder = Path(manifest["store"])
    if not store_folder.is_dir():
        raise UserError(
            f"the corpus of index {folder} is not at {store_folder} any more: prepare it again with `index`"
        )
    try:
        read_prepared(store_folder, verify)
        store = TokenStore(store_folder, "train", manifest["block_size"], bool(manifest.get("isolated")))
    except DamagedDataError as error:
        raise UserError(
            f"the corpus of index {folder} at {store_folder} is damaged: {error.damage}; run the `index` that built it"
            " again, which prepares the corpus anew"
        ) from error
    if store.manifest["fingerprint"] != manifest["data"]:
        raise UserError(
            f"index {folder} was built over corpus {manifest['data']}, but {store_folder} holds"
            f" {store.manifest['fingerprint']}: build the index again"
        )
    if manifest["tokens"] > len(store) * store.block_size:
        raise UserError(
            f"{folder / 'manifest.json'} is damaged ({manifest['tokens']} tokens of"
            f" {len(store) * store.block_size} in {store_folder}): build the index again"
        )
    return store


def check_model(manifest: dict[str, Any], model: PrismForCausalLM, folder: Path, model_folder: Path) -> None:
    """Raise UserError if an index was built for another model."""
    fingerprint = model_fingerprint(model)
    if fingerprint != manifest["model"]:
        raise UserError(
            f"index {folder} was built for model {manifest['model']}, but {model_folder} is {fingerprint}:"
            " give that model's index by --index, or build one with `index`"
        )
