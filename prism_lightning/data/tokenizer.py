"""Tokenizers: train a byte-level BPE on the corpus, or load one by path or hub name; both encode in the same way.

Text that spells a special token, such as <|endoftext|>, is always encoded as plain text: when data are prepared and
when a model is queried. Documents and queries begin with the special token with which a tokenizer itself begins every
text, as those of Llama and Gemma do.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prism_lightning.common.errors import UserError, visible
from prism_lightning.common.hub_access import hub_problem
from prism_lightning.data.pieces import Cutter, Piece

END_OF_TEXT = "<|endoftext|>"
# Usual names of end tokens, for tokenizers that do not name theirs.
END_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[EOS]", "<|eos|>", "<EOS>", "<|end|>")
# The merges of a 32k vocabulary are stable long before this much text, and training time grows with the text.
TRAINING_CHARACTERS = 200_000_000
# The time of a merge grows with the word, so that text without spaces took quadratic time: 5 s for 100,000 characters.
# The longest word in Python's standard library has 96 characters.
LONGEST_WORD = 256
# GPT-2's words, limited to that length. Text without longer words has the same vocabulary and ids as with GPT-2's.
WORDS = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}{1,N}| ?\p{N}{1,N}| ?[^\s\p{L}\p{N}]{1,N}|\s{1,N}(?!\S)|\s{1,N}").replace(
    ",N}", f",{LONGEST_WORD}}}"
)
# Sequences that long of letters, digits or signs, or of ASCII without a space (base64), have words that do not recur.
# More than this many characters of them only take memory: 80 to 130 bytes per character.
UNBROKEN_CHARACTERS = 5_000_000
UNBROKEN = re.compile(r"[!-~]{N,}|[^\W\d_]{N,}|\d{N,}|(?:[^\w\s]|_){N,}".replace("N", str(LONGEST_WORD)))
BATCH_CHARACTERS = 2**21  # encoded together, which takes 250 MB


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE trained on texts. It encodes any text without loss; token 0 ends a document.

    Raises:
        UserError: the vocabulary is too small for the 256 bytes and the end-of-text token.
    """
    if vocab_size < 257:
        raise UserError(f"data.vocab_size is {vocab_size}: a byte-level tokenizer needs at least 257")
    tokenizer = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    cutter = Cutter(tokenizer)
    assert cutter.places_are_safe  # Computed now: training locks the tokenizer, so a later look-up would deadlock.
    tokenizer.train_from_iterator(_training_batches(texts, cutter), trainer)
    trained = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
    return encoding_plain_text(trained)


def load_tokenizer(name_or_path: str, gguf_file: str | None = None) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a folder, a tokenizer.json or a hub name; print its end token unless it is <|endoftext|>.

    `gguf_file` names a GGUF file there, which has the tokenizer of its model.

    Raises:
        UserError: the tokenizer is not found, cannot be loaded, or is not a fast tokenizer.
    """
    tokenizer, note = _loaded(name_or_path, gguf_file)
    if note:
        print(visible(note), file=sys.stderr, flush=True)
    return tokenizer


def _loaded(name_or_path: str, gguf_file: str | None) -> tuple[PreTrainedTokenizerFast, str | None]:
    """Return a tokenizer, and a note about its end token."""
    path = Path(name_or_path).expanduser()
    if not path.exists() and (path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1):
        raise UserError(f"tokenizer {name_or_path}: no such file or folder; correct data.tokenizer")
    try:
        tokenizer: Any
        if path.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=_configured_end(path))
        else:
            offline = not path.exists() and hub_problem(name_or_path) is not None
            location = str(path) if path.exists() else name_or_path
            tokenizer = AutoTokenizer.from_pretrained(location, gguf_file=gguf_file, local_files_only=offline)
    except Exception as error:  # Errors of the hub, JSON and tokenizers share no base class.
        cause = (None if path.exists() else hub_problem(name_or_path)) or " ".join(str(error).split())[:160]
        raise UserError(
            f"tokenizer {name_or_path} could not be loaded: {cause}; give a folder or tokenizer.json by data.tokenizer"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer {name_or_path} has no fast version: data preparation needs one")
    note = _set_end_token(tokenizer, name_or_path, path / "tokenizer.json" if path.is_dir() else path)
    return encoding_plain_text(tokenizer), note


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer saved in a prepared or exported folder.

    Raises:
        Exception: OSError, ValueError or a bare Exception of `tokenizers`, where it cannot be loaded.
    """
    return encoding_plain_text(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))


def encoding_plain_text(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the same tokenizer, set to encode text that spells a special token as plain text, without truncation."""
    tokenizer.split_special_tokens = True
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    backend.no_truncation()  # A tokenizer.json may have settings of both.
    backend.no_padding()
    return tokenizer


def tokenizer_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return how many ids a model needs: one more than the largest, since a vocabulary may skip ids."""
    return 1 + max(tokenizer.get_vocab().values())


def encode(tokenizer: PreTrainedTokenizerFast, text: str, continued: bool = False) -> list[int]:
    """Return the token ids of one text, the same as in prepared data; `continued` as in `encode_batch`."""
    return encode_batch(tokenizer, [text], [continued])[0].tolist()


def encode_batch(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], continued: Sequence[bool] | None = None
) -> list[np.ndarray]:
    """Return the token ids of each text, computed in parallel and in bounded memory; special tokens are plain text.

    Args:
        tokenizer: of the ids.
        texts: that are encoded.
        continued: whether each text continues another one. It then gets neither the token nor the space that a
            tokenizer puts before every text. By default none does.
    """
    encoding_plain_text(tokenizer)
    cutter = _cutter(tokenizer)
    continued = continued or [False] * len(texts)
    starts = zip(texts, continued, strict=True)
    pieces = [(number, piece) for number, start in enumerate(starts) for piece in cutter.pieces(*start)]
    beginning = np.array(beginning_ids(tokenizer), dtype=np.uint32)
    parts: list[list[np.ndarray]] = [[beginning] if len(beginning) and not follows else [] for follows in continued]
    for batch in _batches(pieces):
        for (number, _), ids in zip(batch, _encoded(tokenizer, [piece for _, piece in batch]), strict=True):
            parts[number].append(ids)
    return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]


def _encoded(tokenizer: PreTrainedTokenizerFast, pieces: list[Piece]) -> list[np.ndarray]:
    """Return the ids of pieces without those of their contexts."""

    def encoded(texts: list[str]) -> list[np.ndarray]:
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    contexts = sorted({piece.context for piece in pieces if piece.context})
    lengths = {"": 0} | dict(zip(contexts, map(len, encoded(contexts)), strict=True))
    with_contexts = encoded([piece.context + piece.text for piece in pieces])
    return [ids[lengths[piece.context] :] for ids, piece in zip(with_contexts, pieces, strict=True)]


def _batches(pieces: list[tuple[int, Piece]]) -> Iterator[list[tuple[int, Piece]]]:
    """Yield batches of pieces that are encoded together, at most BATCH_CHARACTERS each."""
    batch: list[tuple[int, Piece]] = []
    size = 0
    for number, piece in pieces:
        if batch and size + len(piece.text) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append((number, piece))
        size += len(piece.text)
    if batch:
        yield batch


@lru_cache(maxsize=4)
def _cutter(tokenizer: PreTrainedTokenizerFast) -> Cutter:
    """Return the cutter of a tokenizer; searching its vocabulary takes 0.1 s for 128k tokens, so it is kept."""
    return Cutter(tokenizer.backend_tokenizer)


def _configured_end(path: Path) -> str | None:
    """Return the end token that the tokenizer_config.json beside a tokenizer.json names; None without one."""
    config = path.with_name("tokenizer_config.json")
    if path.name != "tokenizer.json" or not config.is_file():
        return None
    end = json.loads(config.read_text()).get("eos_token")
    return end["content"] if isinstance(end, dict) else end


def _set_end_token(tokenizer: PreTrainedTokenizerFast, name: str, file: Path) -> str | None:
    """Choose the token that ends documents, or add one; return a note about it, None for <|endoftext|>.

    Args:
        tokenizer: loaded by transformers, which adds an end token that only the configuration names.
        name: of the tokenizer, for the note.
        file: the tokenizer.json, which may not exist; it shows whether the end token was added.
    """
    vocabulary = Tokenizer.from_file(str(file)).get_vocab() if file.is_file() else tokenizer.get_vocab()
    if tokenizer.eos_token is None:
        tokenizer.eos_token = _unnamed_end(tokenizer) or END_OF_TEXT
    end = str(tokenizer.eos_token)
    if end not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"eos_token": end})
    number = tokenizer.convert_tokens_to_ids(end)
    if end not in vocabulary:
        size = tokenizer_size(tokenizer)
        return f"tokenizer {name} has no end token: {end} is added as id {number}, {size:,} tokens in all"
    return None if end == END_OF_TEXT else f"tokenizer {name}: documents end with its own {end}, id {number}"


def beginning_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids of the special tokens, mostly one or none, that a tokenizer itself puts before a text."""
    encoding = tokenizer.backend_tokenizer.encode("a")
    first_of_text = encoding.special_tokens_mask.index(0) if 0 in encoding.special_tokens_mask else 0
    return encoding.ids[:first_of_text]


def beginning_alone(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts before a text what this one does, and nothing behind it: for others that call it."""
    if not tokenizer.backend_tokenizer.encode("a").special_tokens_mask[-1]:
        return tokenizer
    other = copy.deepcopy(tokenizer)
    names = [(str(tokenizer.convert_ids_to_tokens(number)), number) for number in beginning_ids(tokenizer)]
    template = " ".join([name for name, _ in names] + ["$A"])
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=names)
    return other


def beginning_of(name_or_path: str) -> list[int]:
    """Return `beginning_ids` of a tokenizer by its name or path. Raises as `load_tokenizer` does."""
    return beginning_ids(_loaded(name_or_path, None)[0])


def _unnamed_end(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the end token of a tokenizer that names none: the token it appends to a text, else a usual name."""
    backend = tokenizer.backend_tokenizer
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    encoding = backend.encode("a")
    last = encoding.tokens[-1] if encoding.tokens and encoding.special_tokens_mask[-1] else None
    if last in added and encoding.tokens.index(last) > 0:
        return last
    return next((end for end in END_NAMES if end in added), None)


def _training_batches(texts: Iterable[str], cutter: Cutter) -> Iterator[list[str]]:
    """Yield batches of text pieces to train on, up to TRAINING_CHARACTERS in all."""
    characters = 0
    pieces = _without_unbroken(piece.text for text in texts for piece in cutter.pieces(text))
    while characters < TRAINING_CHARACTERS and (batch := list(islice(pieces, 256))):
        characters += sum(map(len, batch))
        yield batch


def _without_unbroken(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts; after UNBROKEN_CHARACTERS of unbroken sequences, leave further ones out."""
    unbroken = 0
    for text in texts:
        if max(map(len, text.split()), default=0) < LONGEST_WORD:  # A quick test that holds for most texts.
            yield text
        elif unbroken < UNBROKEN_CHARACTERS:
            unbroken += sum(map(len, UNBROKEN.findall(text)))
            yield text
        else:
            yield UNBROKEN.sub("", text)
