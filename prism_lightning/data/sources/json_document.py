"""Reader of JSON files: an array of objects, objects one after another, or an object with a list of rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from prism_lightning.data.sources.column import TextColumn
from prism_lightning.data.sources.encoding import READ_BYTES, decoded_chunks
from prism_lightning.data.sources.source import RecordError, row_place

SPACE = re.compile(r"[ \t\n\r]*")
LONGEST_TOKEN = 16  # characters of a literal, an escape or a number that the end of the buffer may cut


def read_json(file: BinaryIO, column: TextColumn) -> Iterator[tuple[int, Any]]:
    """Yield number from 0 and value of every object. Arrays and sequences of objects are read as a stream.

    A single object whose only list of objects has the rows is read whole.

    Raises:
        RecordError: the bytes are not UTF-8; the JSON is invalid; there are several lists; the column is missing.
    """
    return column.values(_records(_Scanner(decoded_chunks(file)), column), row_place)


def _records(scanner: _Scanner, column: TextColumn) -> Iterator[tuple[int, Any]]:
    if scanner.peek() == "[":
        yield from enumerate(scanner.elements())
        if scanner.peek():
            raise scanner.error("there is text after the array")
        return
    row = 0
    while scanner.peek():
        value = scanner.value()
        if row == 0 and not scanner.peek() and isinstance(value, dict) and column.path_in(value) is None:
            yield from enumerate(_rows_inside(value, column))
            return
        yield row, value
        row += 1


def _rows_inside(document: dict[str, Any], column: TextColumn) -> list[Any]:
    """Return the only list of objects in an object; the object itself as the only row if it has none."""
    lists = {
        name: value
        for name, value in document.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    }
    if len(lists) > 1:
        names = ", ".join(lists)
        raise RecordError("", f"several lists of objects ({names}): write the rows as one array, or as JSON Lines")
    return next(iter(lists.values()), [document])


class _Scanner:
    """Reads JSON values one by one from chunks of text; at most two copies of a value's text are in memory."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks, self._buffer, self._at, self._line = chunks, "", 0, 1
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Return the next character that is no space, "" at the end, and move to it."""
        while True:
            self._advance(SPACE.match(self._buffer, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._read():
                return ""

    def elements(self) -> Iterator[Any]:
        """Yield the values of the array that begins at the current position."""
        self._advance(self._at + 1)
        if self.peek() == "]":
            self._advance(self._at + 1)
            return
        while True:
            self.peek()
            yield self.value()
            separator = self.peek()
            if separator not in (",", "]"):
                raise self.error("a comma is missing" if separator else "the file ends within the array")
            self._advance(self._at + 1)
            if separator == "]":
                return

    def value(self) -> Any:
        """Return the value that begins at the current position.

        Raises:
            RecordError: the JSON is invalid; the error names the line.
        """
        while True:
            start = self._at
            try:
                value, end = self._decoder.raw_decode(self._buffer, start)
            except json.JSONDecodeError as error:
                if self._is_cut(error) and self._read():
                    continue
                self._advance(self._at + error.pos - start)
                raise self.error(error.msg) from error
            except (
                ValueError,
                RecursionError,
            ) as error:  # An integer has more than 4300 digits, or values are nested too deeply.
                raise self.error(" ".join(str(error).split())) from error
            self._advance(end)
            return value

    def error(self, problem: str) -> RecordError:
        """Return an error for the current position."""
        return RecordError(f":{self._line}", f"not JSON ({problem}): correct the file, or write it as JSON Lines")

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Return whether the buffer may have ended within a value; other errors must not read the whole file."""
        return error.msg.startswith("Unterminated string") or not self._buffer[error.pos + LONGEST_TOKEN :].strip()

    def _advance(self, position: int) -> None:
        self._line += self._buffer.count("\n", self._at, position)
        self._at = position

    def _read(self) -> bool:
        """Append as much text as the buffer still has, so that a long value is parsed few times; False at the end."""
        parts = [self._buffer[self._at :]]
        target_size = max(READ_BYTES, len(parts[0]))
        self._buffer, self._at = "", 0
        size = 0
        while size < target_size and (chunk := next(self._chunks, None)):
            parts.append(chunk)
            size += len(chunk)
        self._buffer = "".join(parts)
        return size > 0
