"""Local files as documents."""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prism_lightning.common.errors import UserError
from prism_lightning.data.sources.paths import files_of
from prism_lightning.data.sources.registry import (
    IMPLICIT_KINDS,
    TEXT,
    conversion_advice,
    kind_of,
    read_contents,
    unreadable,
)
from prism_lightning.data.sources.rows import Rows, TextRows, document_of
from prism_lightning.data.sources.source import Document, Source

WHOLE_DIGEST_BYTES = 64 * 2**20


def local_files(
    patterns: str | list[str], rows: str | Rows, setting: str = "data.path", chat_template: str | None = None
) -> Source:
    """Return files as a source: a text file is one document, and so is every row of a file with rows.

    Args:
        patterns: files, folders and globs, in the order in which they are read.
        rows: what is read of files with rows: the column that holds the text, where a dotted path names a field
            inside it; or the columns of prompts and completions, or of chats.
        setting: name of the setting that has the patterns, for error messages.
        chat_template: Jinja template, or a file with one, that renders chat messages in the column of the text.

    Raises:
        UserError: nothing matches, or a kind of file cannot be read. While reading: as `read_contents`.
    """
    rows = TextRows(rows, chat_template) if isinstance(rows, str) else rows
    files, unread = files_of([patterns] if isinstance(patterns, str) else list(patterns), setting)
    for path in files:
        if advice := conversion_advice(path.name):
            raise UserError(f"{path}: {path.suffix} files are not read: {advice}, or leave it out of {setting}")
    root = Path(os.path.commonpath([path.resolve().parent for path in files]))
    keys = {path: path.resolve().relative_to(root).as_posix() for path in files}

    def records() -> Iterator[Document | None]:
        for path in files:
            for row, content in read_contents(path, rows, setting):
                yield content and document_of(content, str(path), keys[path], row)

    digests = {keys[path]: file_digest(path, setting) for path in files}
    identity = {"files": digests} | _reading_facts(keys) | rows.identity
    return Source(identity, records, [str(path) for path in unread], masked=rows.masked)


def _reading_facts(keys: dict[Path, str]) -> dict[str, Any]:
    """Return what the documents depend on besides the files' content, where it differs from older versions."""
    order = list(keys.values())
    kinds = {key: kind_of(path.name).name for path, key in keys.items()}
    facts = {
        "order": order if order != sorted(order) else None,  # data.max_tokens uses the first files.
        "kinds": {key: name for key, name in kinds.items() if name not in IMPLICIT_KINDS},
        "without_mark": [key for path, key in keys.items() if kind_of(path.name) is TEXT and _has_mark(path)],
    }
    return {name: fact for name, fact in facts.items() if fact}


def _has_mark(path: Path) -> bool:
    """Return whether a file begins with a byte order mark, which older versions kept in the text."""
    with path.open("rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def file_digest(path: Path, setting: str) -> str:
    """Return a digest of a file's content; above 64 MiB, of its size, time and first megabyte.

    Hashing a terabyte would take an hour.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size > WHOLE_DIGEST_BYTES:
                start = f"{status.st_size} {status.st_mtime_ns}".encode() + file.read(2**20)
                return hashlib.blake2b(start, digest_size=16).hexdigest()
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise unreadable(path, error, setting) from error
