"""Tokenizers: train a byte-level BPE on the corpus, or load one by path or hub name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prism_lightning.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# Merges of a 32k vocabulary are settled long before this much text, and training time grows with it.
TRAINING_CHARACTERS = 200_000_000


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: it encodes any text, and decoding gives the same bytes back. Token 0 ends a document.

    Raises:
        UserError: a vocabulary too small for the 256 bytes and the end-of-text token.
    """
    if vocab_size < 257:
        raise UserError(f"data.vocab_size is {vocab_size}: a byte-level tokenizer needs at least 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_limited(texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """A tokenizer folder, a tokenizer.json, or a hub name.

    Raises:
        UserError: not found, not a fast tokenizer, or without an end-of-text token.
    """
    path = Path(name_or_path).expanduser()
    if not path.exists() and (path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1):
        raise UserError(f"tokenizer {name_or_path}: no such file or folder; correct data.tokenizer")
    try:
        tokenizer: Any
        if path.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=END_OF_TEXT)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(path) if path.exists() else name_or_path)
    except Exception as error:  # hub, JSON and tokenizers errors share no base class
        cause = " ".join(str(error).split())[:160]
        raise UserError(
            f"tokenizer {name_or_path} could not be loaded: {cause}; give a folder or tokenizer.json by data.tokenizer"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer {name_or_path} has no fast version: data preparation needs one")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {name_or_path} has no end-of-text token: set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def encode_batch(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, in parallel; a text that spells a special token is encoded as plain text."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _limited(texts: Iterable[str]) -> Iterator[list[str]]:
    characters, texts = 0, iter(texts)
    while characters < TRAINING_CHARACTERS and (batch := list(islice(texts, 256))):
        characters += sum(map(len, batch))
        yield batch
