"""Prepare data: turn a source into a packed token store, cached by a fingerprint of its inputs, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import filelock
import numpy as np
from transformers import PreTrainedTokenizerFast

from prism_lightning.common.errors import UserError, visible
from prism_lightning.common.files import partial_folder
from prism_lightning.common.progress import PreparationProgress
from prism_lightning.data.completions import encode_masked
from prism_lightning.data.integrity import FORMAT, SPLITS, DamagedDataError, read_prepared, write_manifest
from prism_lightning.data.sources import Document, Source
from prism_lightning.data.splitting import end_held_out, tagged
from prism_lightning.data.store import StoreWriter
from prism_lightning.data.tokenizer import beginning_of, encode_batch, load_tokenizer, tokenizer_size, train_tokenizer

Item = TypeVar("Item")
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1000, 4_000_000


@dataclass(frozen=True)
class Preparation:
    """All inputs of a prepared folder.

    Args:
        train: source of the training text; without `validation`, source of all text.
        validation: source of the validation text, if it has one of its own.
        validation_fraction: share of the text that is held out without `validation`.
        tokenizer: folder, tokenizer.json or hub name; None trains one.
        vocab_size: number of tokens of a tokenizer that is trained.
        max_tokens: approximate number of training tokens after which preparation stops.
        chat_template: renders chats in place of the tokenizer's own template; it is part of the sources' identity.
    """

    train: Source
    validation: Source | None
    validation_fraction: float
    tokenizer: str | None
    vocab_size: int
    max_tokens: int | None
    chat_template: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all inputs: data are prepared in a new folder when one of them changes."""
        inputs = asdict(self) | {
            "train": self.train.identity,
            "validation": self.validation and self.validation.identity,
            "tokenizer": self.tokenizer and _tokenizer_identity(self.tokenizer, self.train.masked),
            "format": FORMAT,
        }
        del inputs["chat_template"]
        return hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=8).hexdigest()

    @cached_property
    def end_held_out(self) -> int | None:
        """Number of characters before the held-out end of the text; None where whole documents are held out."""
        return None if self.validation else end_held_out(self.train, self.validation_fraction)

    @property
    def skipped_nulls(self) -> int:
        """Number of rows without text in the last pass over the documents."""
        return self.train.skipped_nulls + (self.validation.skipped_nulls if self.validation else 0)


def prepare(preparation: Preparation, cache_dir: Path) -> Path:
    """Return the prepared folder; prepare the data if it does not exist yet or is damaged.

    The folder is renamed when it is complete, so that an interruption leaves nothing incomplete. A lock lets one of
    several processes prepare the data while the others wait.

    Raises:
        UserError: the sources, the tokenizer, the cache or prepared data cannot be used.
    """
    folder = cache_dir / preparation.fingerprint
    if _damage(folder) is None:
        return folder
    with writing_cache(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(cache_dir, os.W_OK):
        raise UserError(f"data.cache_dir {cache_dir} cannot be written: choose another")
    lock = filelock.FileLock(cache_dir / f"{folder.name}.lock")
    with writing_cache(cache_dir):
        lock.acquire()
    try:
        damage = _damage(folder)  # Another process may have prepared the data meanwhile.
        if damage is not None:
            if damage:
                print(f"prepared data {folder} are damaged: {damage}; preparing them anew", file=sys.stderr, flush=True)
            with writing_cache(cache_dir), partial_folder(folder) as partial:
                _write(preparation, partial)
    finally:
        lock.release()
    return folder


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a prepared folder, "" if it does not exist, and None if it is undamaged."""
    try:
        if not os.path.lexists(folder):
            return ""
        read_prepared(folder, checksums=True)
    except DamagedDataError as error:
        return error.damage
    return None


@contextmanager
def writing_cache(cache_dir: Path) -> Iterator[None]:
    """Turn an error of writing into one that names the cache and the fix; `_reading` does so for errors of reading."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "os error" not in str(error):  # `tokenizers` raises bare exceptions.
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
        raise UserError(
            f"data could not be written to data.cache_dir {cache_dir} ({reason}): free space there, or set another"
            " data.cache_dir; nothing incomplete is left"
        ) from error


def _reading(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the same items; turn an error of reading them into one that names the file."""
    try:
        yield from items
    except OSError as error:
        raise UserError(f"{error.filename or 'the data'} could not be read ({error.strerror or error})") from error


def _write(preparation: Preparation, work: Path) -> None:
    """Write the whole prepared folder."""
    with PreparationProgress() as progress:
        tokenizer, characters = _tokenizer(preparation, progress)
        if preparation.chat_template is not None:
            tokenizer.chat_template = preparation.chat_template  # the trained model's folder then has it
        size = tokenizer_size(tokenizer)
        dtype = "uint16" if size <= 2**16 else "uint32"
        progress.start_stage("tokenising")
        counts = _write_splits(preparation, work, tokenizer, dtype, _reporter(preparation, characters, progress))
        for note in notes(preparation):
            print(note, flush=True)
        _check(counts, tokenizer)
        tokenizer.save_pretrained(work / "tokenizer")
        facts: dict[str, Any] = {"fingerprint": preparation.fingerprint, "dtype": dtype, **counts}
        facts |= {"tokenizer_size": size, "inputs": preparation.train.identity}
        write_manifest(work, facts | {"skipped_nulls": preparation.skipped_nulls})


def _write_splits(
    preparation: Preparation,
    work: Path,
    tokenizer: PreTrainedTokenizerFast,
    dtype: str,
    report: Callable[[int, int, int], None],
) -> dict[str, dict[str, int]]:
    """Tokenise all documents into both splits and return the counts of each."""
    documents_done = characters_done = 0
    with ExitStack() as stack:
        masked = preparation.train.masked
        writers = {split: stack.enter_context(closing(StoreWriter(work / split, dtype, masked))) for split in SPLITS}
        for split, documents in _reading(_tagged_batches(preparation, lambda: writers["train"].tokens)):
            _append(writers[split], tokenizer, documents, masked)
            documents_done += len(documents)
            characters_done += sum(len(document.text) for document in documents)
            report(documents_done, characters_done, writers["train"].tokens)
        return {split: writer.counts for split, writer in writers.items()}


def _reporter(
    preparation: Preparation, total_characters: int | None, progress: PreparationProgress
) -> Callable[[int, int, int], None]:
    """Return a function that reports the documents, characters and training tokens done, with a share if known."""

    def report(documents: int, characters: int, tokens: int) -> None:
        shares = [characters / total_characters] if total_characters else []
        shares += [tokens / preparation.max_tokens] if preparation.max_tokens else []
        progress(f"{documents:,} documents, {tokens:,} training tokens", max(shares, default=0.0))

    return report


def _tokenizer(preparation: Preparation, progress: PreparationProgress) -> tuple[PreTrainedTokenizerFast, int | None]:
    """Return the configured tokenizer or a trained one, and the number of characters if training read all documents."""
    if preparation.tokenizer:
        return load_tokenizer(preparation.tokenizer), None
    total: list[int] = []

    def texts() -> Iterator[str]:
        documents = characters = 0
        progress.start_stage("reading text to train the tokenizer")
        for split, document in _reading(_tagged(preparation)):
            documents += 1
            characters += len(document.text)
            progress(f"{documents:,} documents, {characters:,} characters")
            if split == "train":
                yield document.text
        progress.start_stage("training the tokenizer")
        progress(f"{documents:,} documents, {characters:,} characters")
        total.append(characters)

    tokenizer = train_tokenizer(texts(), preparation.vocab_size)
    return tokenizer, total[0] if total else None


def _tagged(preparation: Preparation) -> Iterator[tuple[str, Document]]:
    """Yield every document with its split."""
    return tagged(preparation.train, preparation.validation, preparation.validation_fraction, preparation.end_held_out)


def notes(preparation: Preparation) -> list[str]:
    """Return notes for the user about the last pass over the documents, a line each."""
    lines = []
    for source in filter(None, (preparation.train, preparation.validation)):
        if source.unread_files:
            names = ", ".join(source.unread_files[:3]) + (", ..." if len(source.unread_files) > 3 else "")
            lines.append(f"{len(source.unread_files):,} files without text were skipped: {names}")
    if preparation.skipped_nulls:
        lines.append(f"{preparation.skipped_nulls:,} rows without text (null) were skipped")
    if preparation.end_held_out is not None:
        share = f"{100 * preparation.validation_fraction:g} %"
        if preparation.train.masked:
            lines.append(
                f"too few documents to hold out random ones: those in the last {share} are the validation split"
            )
        else:
            lines.append(
                f"too few documents to hold out whole ones: the last {share} of the text is the validation split"
            )
    return [visible(line) for line in lines]


def _tagged_batches(preparation: Preparation, train_tokens: Callable[[], int]) -> Iterator[tuple[str, list[Document]]]:
    """Yield batches of documents of one split, limited in number and characters, until there are `max_tokens`."""
    pending: dict[str, list[Document]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for split, document in _tagged(preparation):
        pending[split].append(document)
        sizes[split] += len(document.text)
        if len(pending[split]) >= BATCH_DOCUMENTS or sizes[split] >= BATCH_CHARACTERS:
            yield split, pending[split]
            pending[split], sizes[split] = [], 0
            if preparation.max_tokens and train_tokens() >= preparation.max_tokens:
                break
    yield from ((split, documents) for split, documents in pending.items() if documents)


def _append(writer: StoreWriter, tokenizer: PreTrainedTokenizerFast, documents: list[Document], masked: bool) -> None:
    targets = None
    if masked:
        encoded = encode_masked(tokenizer, documents)
        ids, targets = [document.ids for document in encoded], [document.targets for document in encoded]
        sizes = [document.target_bytes for document in encoded]
    else:
        end = np.uint32(tokenizer.eos_token_id)
        ids = [np.append(ids, end) for ids in encode_batch(tokenizer, [document.text for document in documents])]
        sizes = [len(document.text.encode()) for document in documents]
    writer.append(
        names=[document.name for document in documents],
        rows=[document.row for document in documents],
        sizes=sizes,
        ids=ids,
        targets=targets,
    )


def _check(counts: dict[str, dict[str, int]], tokenizer: PreTrainedTokenizerFast) -> None:
    for split in SPLITS:
        if counts[split]["documents"] == 0:
            advice = "give --data.validation_path" if split == "validation" else "check data.path and data.text_column"
            raise UserError(f"the {split} split is empty: {advice}")
        if counts[split].get("targets") == 0:
            raise UserError(
                f"all targets of the {split} split are masked, so nothing can be learned from it: give chats with turns"
                " of the role assistant, or rows with a completion"
            )
        if counts[split]["max_id"] >= tokenizer_size(tokenizer):
            raise UserError(
                f"the tokenizer has {tokenizer_size(tokenizer)} tokens but the data hold id {counts[split]['max_id']}:"
                " give the tokenizer that made these ids by data.tokenizer"
            )


def _tokenizer_identity(name_or_path: str, with_template: bool) -> Any:
    """Return digests of the files that define a tokenizer, or the name of one from the hub.

    Args:
        name_or_path: of the tokenizer.
        with_template: whether files of chat templates count, too.
    """
    suffixes = (".json", ".txt", ".model", *([".jinja"] if with_template else []))
    path = Path(name_or_path).expanduser()
    files = sorted({path, path.with_name("tokenizer_config.json")}) if path.is_file() else sorted(path.glob("*"))
    try:
        digests = [
            hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
            for file in files
            # Weights that may be in the same folder are left out.
            if file.is_file() and (file == path or file.suffix in suffixes)
        ]
    except OSError as error:
        raise UserError(
            f"tokenizer {error.filename} cannot be read ({error.strerror}): correct data.tokenizer"
        ) from error
    identity = digests or name_or_path
    beginning = beginning_of(name_or_path)  # once left out of the data, which these then differ from
    return {"files": identity, "beginning": beginning} if beginning else identity
