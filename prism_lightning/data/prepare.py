"""Turn a source into a packed token store: cached by a fingerprint of its inputs, and all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerFast

from prism_lightning.data.sources import Document, Source
from prism_lightning.data.splitting import end_held_out, tagged
from prism_lightning.data.store import StoreWriter
from prism_lightning.data.tokenizer import encode_batch, load_tokenizer, train_tokenizer
from prism_lightning.errors import UserError, visible

FORMAT = 1  # raise when the files below change meaning: older caches are then prepared anew
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1000, 4_000_000
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Preparation:
    """Everything the prepared folder depends on."""

    train: Source
    validation: Source | None
    validation_fraction: float
    tokenizer: str | None
    vocab_size: int
    max_tokens: int | None

    @property
    def fingerprint(self) -> str:
        """Identity of the inputs; a change of any of them prepares a new folder."""
        inputs = asdict(self) | {
            "train": self.train.identity,
            "validation": self.validation and self.validation.identity,
            "tokenizer": self.tokenizer and _tokenizer_identity(self.tokenizer),
            "format": FORMAT,
        }
        return hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=8).hexdigest()

    @cached_property
    def end_held_out(self) -> int | None:
        """Characters before the end of the text that is held out, where no whole document is."""
        return None if self.validation else end_held_out(self.train, self.validation_fraction)

    @property
    def skipped_nulls(self) -> int:
        """Rows without text in the last pass over the documents."""
        return self.train.skipped_nulls + (self.validation.skipped_nulls if self.validation else 0)


def prepare(preparation: Preparation, cache_dir: Path) -> Path:
    """The prepared folder, made if it is not there yet.

    Works in a folder of its own and renames it when complete, so an interruption leaves nothing half-done; a lock
    lets one of several processes work while the others wait.
    """
    folder = cache_dir / preparation.fingerprint
    if folder.is_dir():
        return folder
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir {cache_dir} cannot be made ({error.strerror}): choose another") from error
    if not os.access(cache_dir, os.W_OK):
        raise UserError(f"data.cache_dir {cache_dir} cannot be written: choose another")
    with filelock.FileLock(cache_dir / f"{folder.name}.lock"):
        if folder.is_dir():
            return folder
        work = cache_dir / f"{folder.name}.partial"
        shutil.rmtree(work, ignore_errors=True)  # what a killed preparation left
        try:
            _write(preparation, work)
            os.rename(work, folder)
        except OSError as error:
            raise UserError(
                f"data could not be prepared in {cache_dir}: {error.strerror}; free space or set data.cache_dir"
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _write(preparation: Preparation, work: Path) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.fields[done]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("training tokenizer", total=None, done="")
        tokenizer = _tokenizer(preparation)
        dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
        progress.update(task, description="tokenising")
        with ExitStack() as stack:
            writers = {split: stack.enter_context(closing(StoreWriter(work / split, dtype))) for split in SPLITS}
            for split, documents in _tagged_batches(preparation, lambda: writers["train"].tokens):
                _append(writers[split], tokenizer, documents)
                done = f"{writers['train'].documents:,} documents, {writers['train'].tokens:,} tokens"
                progress.update(task, done=done)
            counts = {split: writer.counts for split, writer in writers.items()}
    for remark in remarks(preparation):
        print(remark, flush=True)
    _check(counts, tokenizer)
    tokenizer.save_pretrained(work / "tokenizer")
    manifest: dict[str, Any] = {"format": FORMAT, "fingerprint": preparation.fingerprint, "dtype": dtype, **counts}
    manifest |= {"tokenizer_size": len(tokenizer), "inputs": preparation.train.identity}
    manifest["skipped_nulls"] = preparation.skipped_nulls
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _tokenizer(preparation: Preparation) -> PreTrainedTokenizerFast:
    if preparation.tokenizer:
        return load_tokenizer(preparation.tokenizer)
    texts = (document.text for split, document in _tagged(preparation) if split == "train")
    return train_tokenizer(texts, preparation.vocab_size)


def _tagged(preparation: Preparation) -> Iterator[tuple[str, Document]]:
    """Every document with its split."""
    return tagged(preparation.train, preparation.validation, preparation.validation_fraction, preparation.end_held_out)


def remarks(preparation: Preparation) -> list[str]:
    """What a user should know about the pass over the documents that has ended, in a line each."""
    lines = []
    for source in filter(None, (preparation.train, preparation.validation)):
        if source.unread_files:
            names = ", ".join(source.unread_files[:3]) + (", ..." if len(source.unread_files) > 3 else "")
            lines.append(f"{len(source.unread_files):,} files without text were passed over: {names}")
    if preparation.skipped_nulls:
        lines.append(f"{preparation.skipped_nulls:,} rows without text (null) were skipped")
    if preparation.end_held_out is not None:
        share = f"{100 * preparation.validation_fraction:g} %"
        lines.append(f"too few documents to hold whole ones out: the last {share} of the text is the validation split")
    return [visible(line) for line in lines]


def _tagged_batches(preparation: Preparation, train_tokens: Callable[[], int]) -> Iterator[tuple[str, list[Document]]]:
    """Batches of documents of one split, bounded in number and in characters, until there are tokens enough."""
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


def _append(writer: StoreWriter, tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> None:
    ids = encode_batch(tokenizer, [document.text for document in documents])
    writer.append(
        names=[document.name for document in documents],
        rows=[document.row for document in documents],
        sizes=[len(document.text.encode()) for document in documents],
        ids=[[*document_ids, tokenizer.eos_token_id] for document_ids in ids],
    )


def _check(counts: dict[str, dict[str, int]], tokenizer: PreTrainedTokenizerFast) -> None:
    for split in SPLITS:
        if counts[split]["documents"] == 0:
            fix = "give --data.validation_path" if split == "validation" else "check data.path and data.text_column"
            raise UserError(f"the {split} split is empty: {fix}")
        if counts[split]["max_id"] >= len(tokenizer):
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens but the data hold id {counts[split]['max_id']}:"
                " give the tokenizer that made these ids by data.tokenizer"
            )


def _tokenizer_identity(name_or_path: str) -> Any:
    path = Path(name_or_path).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    return [hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() for file in files] or name_or_path
