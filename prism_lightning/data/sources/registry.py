"""The registry of file kinds, and how problems with a file are reported.

To add a kind of file:

1. Write `read_NAME(file, column)` in a module of its own here. It takes the unpacked file and a column, and
   yields a row number and a value for each record. It raises `RecordError` for what it cannot read.
2. Enter the suffix in `KINDS` with a `FileKind` of a new name.

Compression, folders, globs, nulls, chat messages, error messages and the fingerprint follow from that entry.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any, BinaryIO

import pyarrow
import zstandard

from prism_lightning.common.errors import UserError, disk_is_full
from prism_lightning.data.sources.arrow import read_arrow
from prism_lightning.data.sources.column import TextColumn
from prism_lightning.data.sources.delimited import read_csv, read_tsv
from prism_lightning.data.sources.encoding import HEAD_BYTES, check_encoding, is_binary
from prism_lightning.data.sources.json_document import read_json
from prism_lightning.data.sources.json_lines import read_json_lines
from prism_lightning.data.sources.opening import opened, suffix_of
from prism_lightning.data.sources.parquet import read_parquet
from prism_lightning.data.sources.rows import Content, Rows
from prism_lightning.data.sources.source import RecordError, line_place, row_place
from prism_lightning.data.sources.text import read_text

READ_FAILURES = (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException)


@dataclass(frozen=True)
class FileKind:
    """One kind of file.

    Args:
        name: part of the identity of a corpus, unless it is one of IMPLICIT_KINDS.
        read: yields row and value of every record; raises `RecordError`.
        has_rows: whether each row of a file is a document.
        is_text: whether a file holds UTF-8 text. The content of other files must be seekable: it is unpacked first.
        place: returns where a row stands, for error messages.
    """

    name: str
    read: Callable[[BinaryIO, TextColumn], Iterator[tuple[int, Any]]]
    has_rows: bool = True
    is_text: bool = True
    place: Callable[[int], str] = row_place


TEXT = FileKind("text", read_text, has_rows=False, place=lambda row: "")
JSON_LINES = FileKind("json_lines", read_json_lines, place=line_place)
ARROW = FileKind("arrow", read_arrow, is_text=False)
KINDS = {  # by suffix; every other suffix is text
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".json": FileKind("json", read_json),
    ".csv": FileKind("csv", read_csv),
    ".tsv": FileKind("tsv", read_tsv),
    ".parquet": FileKind("parquet", read_parquet, is_text=False),
    ".arrow": ARROW,
    ".feather": ARROW,
}
# The first version read these. Its fingerprints have no kinds, so leaving them out keeps its prepared data valid.
IMPLICIT_KINDS = ("text", "json_lines", "csv", "parquet")
UNREADABLE = {
    "unpack it": (".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".lz4", ".lzma", ".br"),
    "save its text as .txt, e.g. with pdftotext or pandoc": (".pdf", ".doc", ".docx", ".odt", ".epub", ".ppt", ".pptx"),
    "save it as CSV": (".xls", ".xlsx", ".ods"),
    "write its rows as Parquet or JSON Lines": (
        *(".orc", ".avro", ".db", ".sqlite", ".sqlite3", ".h5", ".hdf5", ".msgpack", ".tfrecord"),
        *(".pkl", ".pickle", ".npy", ".npz", ".pt", ".bin", ".safetensors"),
    ),
    "it holds no text": (
        *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".ico", ".mp3", ".wav", ".flac", ".mp4", ".avi", ".mkv"),
        *(".exe", ".dll", ".so", ".o", ".a", ".pyc", ".whl", ".jar", ".class"),
    ),
}
CONVERSIONS = {suffix: advice for advice, suffixes in UNREADABLE.items() for suffix in suffixes}


def kind_of(name: str) -> FileKind:
    """Return the kind of a file by its name, whether packed or not."""
    return KINDS.get(suffix_of(name)[0], TEXT)


def has_rows(name: str) -> bool:
    """Return whether each row of a file of this name is a document."""
    return kind_of(name).has_rows


def conversion_advice(name: str) -> str | None:
    """Return how to convert a file that cannot be read, by its suffix; None where it can be read."""
    suffix = suffix_of(name)[0]
    return None if suffix in KINDS else CONVERSIONS.get(suffix)


def holds_no_text(path: Path, setting: str) -> bool:
    """Return whether a file of a folder is skipped, since it is an image, an archive or another binary file.

    Raises:
        UserError: the file cannot be read.
    """
    if conversion_advice(path.name):
        return True
    if not kind_of(path.name).is_text:
        return False
    try:
        with opened(path, seekable=False) as file:
            return is_binary(file.peek(HEAD_BYTES)[:HEAD_BYTES])
    except READ_FAILURES as error:
        raise unreadable(path, error, setting) from error


def read_contents(path: Path, rows: Rows, setting: str) -> Iterator[tuple[int, Content | None]]:
    """Yield row and content of every record of a file; the content of a null is None.

    A file is read once for each column, so that readers need to know one column only.

    Args:
        path: of the file.
        rows: the columns that are read, in files with rows.
        setting: the setting that named the file, for error messages.

    Raises:
        UserError: the file or one of its records cannot be read. The message names the file and the place.
    """
    kind = kind_of(path.name)
    if rows.masked and not kind.has_rows:
        column = rows.columns[0]
        raise UserError(f"{path} has no columns ({column.setting} {column.name}): leave it out of {setting}")
    try:
        with ExitStack() as stack:
            readers = []
            for column in rows.columns:
                file = stack.enter_context(opened(path, seekable=not kind.is_text))
                if kind.is_text:
                    check_encoding(file.peek(HEAD_BYTES)[:HEAD_BYTES])
                readers.append(kind.read(file, column))
            for records in zip(*readers, strict=True):
                row = records[0][0]
                yield row, rows.content([value for _, value in records], kind.place(row))
    except RecordError as error:
        raise UserError(f"{path}{error.where}: {error.problem}") from error
    except READ_FAILURES as error:
        raise unreadable(path, error, setting) from error


def place_of(name: str, row: int) -> str:
    """Return the place of a document as error messages write it: FILE, FILE:LINE or NAME row ROW."""
    kind = kind_of(name)
    return name + (kind.place(row) if kind.has_rows else row_place(row))


def unreadable(path: Path, error: Exception, setting: str) -> UserError:
    """Return the error for a file that cannot be read; errors of writing the cache are reported elsewhere."""
    if disk_is_full(error):
        return UserError(f"{path} could not be unpacked in {gettempdir()}: free space there, or set TMPDIR")
    if isinstance(error, OSError) and error.errno and error.strerror:
        return UserError(f"{path} could not be read ({error.strerror}): make it readable, or leave it out of {setting}")
    cause = " ".join(str(error).split())[:200].rstrip(".")
    advice = f"the file is damaged or incomplete; get it again, or leave it out of {setting}"
    return UserError(f"{path} could not be read ({cause}): {advice}")
