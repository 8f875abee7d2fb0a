"""JSON files: an array of objects, objects one after another, or one object that holds the rows in a list."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from prism_lightning.data.sources.column import TextColumn
from prism_lightning.data.sources.encoding import READ_BYTES, decoded_chunks
from prism_lightning.data.sources.source import RecordError, row_place

SPACE = re.compile(r"[ \t\n\r]*")
LONGEST_TOKEN = 16  # characters of a literal, an escape or the like that the end of the buffer may cut


def read_json(file: BinaryIO, column: TextColumn) -> Iterator[tuple[int, Any]]:
    """Number from 0 and value of every object; arrays and objects one after another are read as a stream.

    One object that holds the rows in its only list of objects is read whole.

    Raises:
        RecordError: bytes that are not UTF-8; broken JSON; no rows; a missing column.
    """
    return column.values(_records(_Scanner(decoded_chunks(file)), column), row_place)


def _records(scanner: _Scanner, column: TextColumn) -> Iterator[tuple[int, Any]]:
    if scanner.peek() == "[":
        yield from enumerate(scanner.elements())
        if scanner.peek():
            raise scanner.error("there is text behind the array")
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
    """The only list of objects in an object; the object itself as the only row where it has none."""
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
    """Takes JSON values one by one from text that comes in chunks: holds the text of one value, at most twice."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks, self._buffer, self._at, self._line = chunks, "", 0, 1
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self._advance(SPACE.match(self._buffer, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._read():
                return ""

    def elements(self) -> Iterator[Any]:
        """The values of the array that begins here."""
        self._advance(self._at + 1)
        if self.peek() == "]":
            self._advance(self._at + 1)
            return
        while True:
            self.peek()
            yield self.value()
            after = self.peek()
            if after not in (",", "]"):
                raise self.error("the file ends within the array" if not after else "a comma is missing")
            self._advance(self._at + 1)
            if after == "]":
                return

    def value(self) -> Any:
        """The value that begins here.

        Raises:
            RecordError: broken JSON, with its line.
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
            except (ValueError, RecursionError) as error:  # an integer of more than 4300 digits; nested too deeply
                raise self.error(" ".join(str(error).split())) from error
            self._advance(end)
            return value

    def error(self, problem: str) -> RecordError:
        """The error about what stands here."""
        return RecordError(f":{self._line}", f"not JSON ({problem}): mend the file, or write it as JSON Lines")

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the buffer may have ended within a value. What is broken elsewhere must not read the whole file."""
        return error.msg.startswith("Unterminated string") or not self._buffer[error.pos + LONGEST_TOKEN :].strip()

    def _advance(self, position: int) -> None:
        self._line += self._buffer.count("\n", self._at, position)
        self._at = position

    def _read(self) -> bool:
        """Append as much text as is left in the buffer, so that a long value is parsed few times; False at the end."""
        parts = [self._buffer[self._at :]]
        wanted = max(READ_BYTES, len(parts[0]))
        self._buffer, self._at = "", 0
        size = 0
        while size < wanted and (chunk := next(self._chunks, None)):
            parts.append(chunk)
            size += len(chunk)
        self._buffer = "".join(parts)
        return size > 0
