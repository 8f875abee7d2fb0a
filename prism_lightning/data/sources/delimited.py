"""Readers of CSV and TSV files with a header, quoted as spreadsheets do."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from typing import BinaryIO

from prism_lightning.data.sources.column import TextColumn
from prism_lightning.data.sources.encoding import decoded_lines
from prism_lightning.data.sources.source import RecordError


def read_csv(file: BinaryIO, column: TextColumn) -> Iterator[tuple[int, str | None]]:
    """Yield number from 0 and value of every record; an empty field is a null, since CSV has no other.

    Raises:
        RecordError: the bytes are not UTF-8; quotes are broken; the column is missing.
    """
    return _read(file, column, ",")


def read_tsv(file: BinaryIO, column: TextColumn) -> Iterator[tuple[int, str | None]]:
    """Yield the same as `read_csv` from a file with tabs between the fields."""
    return _read(file, column, "\t")


def _read(file: BinaryIO, column: TextColumn, delimiter: str) -> Iterator[tuple[int, str | None]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(_lines(file), delimiter=delimiter)
    try:
        (name,) = column.required_path(dict.fromkeys(reader.fieldnames or [], ""))
        for number, record in enumerate(reader):
            yield number, record[name] or None
    except csv.Error as error:
        raise RecordError(f":{reader.line_num}", f"not CSV ({error}): correct the line") from error


def _lines(file: BinaryIO) -> Iterator[str]:
    r"""Yield lines that end with \n, \r or \r\n, since the csv module needs them separate."""
    for line in decoded_lines(file):
        if "\r" in line:
            yield from io.StringIO(line, newline="")
        else:
            yield line
