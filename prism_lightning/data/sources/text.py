"""Reader of text files: one document each."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from prism_lightning.data.sources.column import TextColumn
from prism_lightning.data.sources.encoding import not_utf8
from prism_lightning.data.sources.source import RecordError


def read_text(file: BinaryIO, column: TextColumn) -> Iterator[tuple[int, str]]:
    """Yield row 0 and the whole text.

    Raises:
        RecordError: the bytes are not UTF-8, or have a NUL, which UTF-8 allows but which no text has.
    """
    content = file.read()
    mark = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        text = str(memoryview(content)[mark:], "utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(f", byte {mark + error.start}", error) from error
    if b"\0" in content:
        problem = "a NUL, so this is no text: convert the file to text or to JSON Lines"
        raise RecordError(f", byte {content.index(0)}", problem)
    del content  # The document is in memory once while it is processed.
    yield 0, text
