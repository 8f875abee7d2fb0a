"""Text files: one document each."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from prism_lightning.data.sources.column import TextColumn
from prism_lightning.data.sources.encoding import not_utf8
from prism_lightning.data.sources.source import RecordError


def read_text(file: BinaryIO, column: TextColumn) -> Iterator[tuple[int, str]]:
    """Row 0 and the whole text.

    Raises:
        RecordError: bytes that are not UTF-8; a NUL byte, which no text has but which UTF-8 allows.
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
    del content  # a document is held once while it is worked on
    yield 0, text
