"""Reader of JSON Lines: files with an object in each line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from prism_lightning.data.sources.column import TextColumn
from prism_lightning.data.sources.encoding import decoded_line
from prism_lightning.data.sources.source import RecordError, line_place


def read_json_lines(file: BinaryIO, column: TextColumn) -> Iterator[tuple[int, Any]]:
    """Yield number from 0 and value of every line that is not blank; a line is in memory at most twice.

    Raises:
        RecordError: the bytes are not UTF-8; a line is no JSON object; the column is missing.
    """
    return column.values(_records(file), line_place)


def _records(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    number = 0
    while line := file.readline():
        text = decoded_line(line, number)
        del line  # A long line is in memory at most twice: as bytes and text, then as text and value.
        if not text.isspace():
            value = _parsed(text, number)
            del text
            yield number, value
        number += 1


def _parsed(text: str, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also stands for an integer of more than 4300 digits.
        cause = error.msg if isinstance(error, json.JSONDecodeError) else " ".join(str(error).split())
        problem = f"not a JSON object ({cause}): correct or remove the line; name a file that is one array .json"
        raise RecordError(line_place(number), problem) from error
