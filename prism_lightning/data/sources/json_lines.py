"""JSON Lines: an object in each line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from prism_lightning.data.sources.column import TextColumn
from prism_lightning.data.sources.encoding import decoded_line
from prism_lightning.data.sources.source import RecordError, line_place


def read_json_lines(file: BinaryIO, column: TextColumn) -> Iterator[tuple[int, Any]]:
    """Line number from 0 and value of every line that is not blank. A long line is held as text and as its value.

    Raises:
        RecordError: bytes that are not UTF-8; a line that is no JSON object; a missing column.
    """
    return column.values(_records(file), line_place)


def _records(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    number = 0
    while line := file.readline():
        text = decoded_line(line, number)
        del line  # a long line is held twice at most: as bytes and text, then as text and value
        if not text.isspace():
            value = _parsed(text, number)
            del text
            yield number, value
        number += 1


def _parsed(text: str, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of more than 4300 digits
        cause = error.msg if isinstance(error, json.JSONDecodeError) else " ".join(str(error).split())
        problem = f"not a JSON object ({cause}): mend or remove the line; a file that is one array is named .json"
        raise RecordError(line_place(number), problem) from error
