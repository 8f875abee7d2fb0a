"""Where documents come from: the running Python's standard library, local files, or a Hugging Face dataset."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_lightning.errors import UserError, nearest

# Not part of what a library reader would read, and absent from some installations.
STANDARD_LIBRARY_SKIPS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "__pycache__",
}
WHOLE_DIGEST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Document:
    """One text and where it came from: a file, or a row of a file or data set.

    `key` names the source without the folder the corpus lies in, so that a corpus that moved is still the same.
    """

    text: str
    name: str
    key: str
    row: int = 0


@dataclass(frozen=True)
class Source:
    """Documents in a fixed order, and an identity that changes when they do."""

    identity: dict[str, Any]
    documents: Callable[[], Iterator[Document]]


def standard_library() -> Source:
    """The source files of the Python that runs: real text on every machine, nothing to download."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not STANDARD_LIBRARY_SKIPS.intersection(path.relative_to(root).parts)
    ]
    if not files:
        raise UserError(f"this Python has no standard library sources under {root}: give data.path or data.dataset")

    def documents() -> Iterator[Document]:
        for path in files:
            try:
                with tokenize.open(path) as file:  # honours the coding cookie of each file
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue  # a deliberately broken sample; the library's own modules all read
            if text.strip():
                key = path.relative_to(root).as_posix()
                yield Document(text, key, key)

    digests = {path.relative_to(root).as_posix(): _file_digest(path) for path in files}
    return Source({"standard_library": sys.version, "files": digests}, documents)


def local_files(patterns: str | list[str], text_column: str, setting: str = "data.path") -> Source:
    """Files by path or glob: a .txt or other text file is one document, .jsonl/.csv/.parquet give one a row.

    Args:
        patterns: files, in the order in which they are read.
        text_column: of files with rows.
        setting: that gave the patterns, for errors.

    Raises:
        UserError: nothing matches; while reading: undecodable bytes, broken JSON, a missing column.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        found = [p for p in found if p.is_file()]
        if not found:
            hint = f"a folder; try {pattern.rstrip('/')}/*.jsonl" if path.is_dir() else "no such file"
            raise UserError(f"{setting} {pattern}: {hint}")
        files += [p for p in found if p not in files]

    root = Path(os.path.commonpath([path.resolve().parent for path in files]))
    keys = {path: path.resolve().relative_to(root).as_posix() for path in files}

    def documents() -> Iterator[Document]:
        for path in files:
            for row, text in _rows(path, text_column):
                if text.strip():
                    yield Document(text, str(path), keys[path], row)

    identity = {"files": {keys[path]: _file_digest(path) for path in files}, "text_column": text_column}
    if list(keys.values()) != sorted(keys.values()):
        identity["order"] = list(keys.values())  # data.max_tokens takes the first
    return Source(identity, documents)


def hub_dataset(name: str, config: str | None, split: str, revision: str | None, text_column: str) -> Source:
    """A Hugging Face dataset, streamed: nothing is stored but the tokens made from it."""

    def documents() -> Iterator[Document]:
        import datasets

        try:
            rows = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
            for number, row in enumerate(rows):
                if number == 0 and text_column not in row:
                    raise UserError(f"data.text_column {text_column!r} is not in {name}: {nearest(text_column, row)}")
                if row[text_column] is not None and not isinstance(row[text_column], str):
                    raise UserError(f"column {text_column!r} of {name} is not text: set data.text_column")
                if row[text_column] and row[text_column].strip():
                    yield Document(row[text_column], name, name, number)
        except UserError:
            raise
        except Exception as error:  # network, authentication and naming errors come in many types
            cause = " ".join(str(error).split())[:200]
            raise UserError(
                f"data.dataset {name} (split {split}) could not be read: {cause};"
                " without a network, give local files by --data.path"
            ) from error

    return Source(
        {"dataset": name, "config": config, "split": split, "revision": revision, "text_column": text_column}, documents
    )


ROW_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")  # files that hold a document per row


def _rows(path: Path, text_column: str) -> Iterator[tuple[int, str]]:
    """(row, text) of one file; errors name the file, and the line of a JSON file."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".jsonl", ".ndjson"):
            yield from _jsonl_rows(path, text_column)
        elif suffix == ".csv":
            yield from _csv_rows(path, text_column)
        elif suffix == ".parquet":
            yield from _parquet_rows(path, text_column)
        else:
            yield 0, path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        # A CSV reader decodes chunk by chunk: its bytes are counted from there.
        raise _not_utf8(path if suffix == ".csv" else f"{path}, byte {error.start}", error) from error


def _not_utf8(place: Path | str, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{place}: {error.object[error.start : error.end]!r} is not UTF-8: convert it, e.g. iconv -f latin1 -t utf-8,"
        " or leave it out of data.path"
    )


def _jsonl_rows(path: Path, text_column: str) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise _not_utf8(f"{path}:{number + 1}", error) from error
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}:{number + 1}: not a JSON object ({error.msg}): mend or remove the line"
                ) from error
            if not isinstance(record, dict) or text_column not in record:
                hint = nearest(text_column, record) if isinstance(record, dict) else "the line is no object"
                raise UserError(f"{path}:{number + 1}: no column {text_column!r} (data.text_column): {hint}")
            if not isinstance(record[text_column], str):
                raise UserError(f"{path}:{number + 1}: column {text_column!r} is not text: set data.text_column")
            if not _encodes(record[text_column]):
                raise UserError(f"{path}:{number + 1}: half a surrogate pair stands alone: mend or remove the line")
            yield number, record[text_column]


def _encodes(text: str) -> bool:
    """Whether a text is Unicode: JSON can spell what is not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(path: Path, text_column: str) -> Iterator[tuple[int, str]]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if text_column not in (reader.fieldnames or []):
            raise UserError(
                f"{path}: no column {text_column!r} (data.text_column): {nearest(text_column, reader.fieldnames or [])}"
            )
        for number, record in enumerate(reader):
            yield number, record[text_column] or ""


def _parquet_rows(path: Path, text_column: str) -> Iterator[tuple[int, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from error
    if text_column not in table.schema_arrow.names:
        raise UserError(
            f"{path}: no column {text_column!r} (data.text_column): {nearest(text_column, table.schema_arrow.names)}"
        )
    number = 0
    for batch in table.iter_batches(columns=[text_column]):
        for text in batch.column(0).to_pylist():
            if text is not None and not isinstance(text, str):
                raise UserError(f"{path}: column {text_column!r} is not text: set data.text_column")
            yield number, text or ""
            number += 1


def _file_digest(path: Path) -> str:
    """Content digest; past 64 MiB of size, time and first megabyte, since hashing a terabyte takes an hour."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if size <= WHOLE_DIGEST_BYTES:
            digest.update(file.read())
        else:
            digest.update(f"{size} {path.stat().st_mtime_ns}".encode() + file.read(2**20))
    return digest.hexdigest()
