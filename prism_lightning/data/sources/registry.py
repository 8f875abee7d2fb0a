"""The one list of file kinds, and the one place where a problem with a file is given its name."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
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
from prism_lightning.data.sources.source import RecordError, line_place, row_place
from prism_lightning.data.sources.text import read_text

READ_FAILURES = (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException)


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Args:
        name: part of the identity of a corpus where it is not the kind that older versions read the file as.
        read: gives row and value of every record; raises `RecordError`.
        has_rows: a file holds a document per row.
        is_text: a file holds text, in UTF-8.
        place: where a row stands, for errors.
    """

    name: str
    read: Callable[[BinaryIO, TextColumn], Iterator[tuple[int, Any]]]
    has_rows: bool = True
    is_text: bool = True
    place: Callable[[int], str] = row_place


TEXT = Kind("text", read_text, has_rows=False, place=lambda row: "")
JSON_LINES = Kind("json_lines", read_json_lines, place=line_place)
ARROW = Kind("arrow", read_arrow, is_text=False)
KINDS = {  # every other suffix is text
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".json": Kind("json", read_json),
    ".csv": Kind("csv", read_csv),
    ".tsv": Kind("tsv", read_tsv),
    ".parquet": Kind("parquet", read_parquet, is_text=False),
    ".arrow": ARROW,
    ".feather": ARROW,
}
AS_BEFORE = ("text", "json_lines", "csv", "parquet")  # kinds that a suffix has had from the beginning
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


def kind_of(name: str) -> Kind:
    """The kind of a file by its name, whether packed or not."""
    return KINDS.get(suffix_of(name)[0], TEXT)


def has_rows(name: str) -> bool:
    """Whether a file of this name holds a document per row."""
    return kind_of(name).has_rows


def conversion_advice(name: str) -> str | None:
    """How to convert a file that cannot be read, by its suffix; None where it can."""
    return CONVERSIONS.get(suffix_of(name)[0])


def holds_no_text(path: Path, setting: str) -> bool:
    """Whether a file among others is to be passed over: a picture, an archive, any binary file.

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


def read_texts(path: Path, column: TextColumn, setting: str) -> Iterator[tuple[int, str | None]]:
    """Row and text of every record of a file; None for a null.

    Args:
        path: of the file.
        column: that holds the text, in files with rows.
        setting: that named the file, for errors.

    Raises:
        UserError: the file cannot be read, or a record of it; names the file and the place.
    """
    kind = kind_of(path.name)
    try:
        with opened(path, seekable=not kind.is_text) as file:
            if kind.is_text:
                check_encoding(file.peek(HEAD_BYTES)[:HEAD_BYTES])
            for row, value in kind.read(file, column):
                yield row, column.text(value, kind.place(row))
    except RecordError as error:
        raise UserError(f"{path}{error.where}: {error.problem}") from error
    except READ_FAILURES as error:
        raise unreadable(path, error, setting) from error


def unreadable(path: Path, error: Exception, setting: str) -> UserError:
    """The error about a file that cannot be read, as opposed to a cache that cannot be written."""
    if disk_is_full(error):
        return UserError(f"{path} could not be unpacked in {gettempdir()}: free space there, or set TMPDIR")
    if isinstance(error, OSError) and error.errno and error.strerror:
        return UserError(f"{path} could not be read ({error.strerror}): make it readable, or leave it out of {setting}")
    cause = " ".join(str(error).split())[:200].rstrip(".")
    advice = f"the file is damaged or incomplete; get it again, or leave it out of {setting}"
    return UserError(f"{path} could not be read ({cause}): {advice}")
