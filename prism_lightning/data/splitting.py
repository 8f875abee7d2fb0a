"""Which text is held out for validation: whole documents by their identity, or the end of the text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

from prism_lightning.data.sources import Document, Source


def in_validation(document: Document, fraction: float) -> bool:
    """Whether a document belongs to validation: its identity decides, neither order, seed nor other documents.

    So runs of several seeds are validated on the same text, and share one prepared folder.
    """
    key = f"0\0{document.key}\0{document.row}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < fraction * 2**64


def end_held_out(source: Source, fraction: float) -> int | None:
    """Characters before the end of the text that is held out; None where whole documents are held out.

    One document is in one split, and a few may all be in the same. Otherwise reading stops at the first document that
    is held out, after 1 / fraction documents on average.
    """
    characters, splits = 0, set()
    for document in source.documents():
        splits.add(in_validation(document, fraction))
        if len(splits) == 2:
            return None
        characters += len(document.text)
    return characters - round(characters * fraction) if splits else None


def tagged(
    source: Source, validation: Source | None, fraction: float, end: int | None
) -> Iterator[tuple[str, Document]]:
    """Every document with its split.

    What of validation stands apart, in a source of its own or at the end of the text, comes first: a token limit
    spares it then.

    Args:
        source: all text without `validation`, else the training text.
        validation: the validation text.
        fraction: of the documents that are held out without `validation`.
        end: as `end_held_out` says.
    """
    if validation:
        yield from (("validation", document) for document in validation.documents())
        yield from (("train", document) for document in source.documents())
    elif end is None:
        for document in source.documents():
            yield ("validation" if in_validation(document, fraction) else "train"), document
    else:
        yield from (("validation", part) for _, part in _cut(source, end, fraction) if part)
        yield from (("train", part) for part, _ in _cut(source, end, fraction) if part)


def _cut(source: Source, end: int, fraction: float) -> Iterator[tuple[Document | None, Document | None]]:
    """The parts of every document before and behind the cut; None for a part that is blank."""
    before = 0
    longest_search = round(end / (1 - fraction) * fraction / 2)  # so that half as much again is held out at most
    for document in source.documents():
        position = min(max(end - before, 0), len(document.text))
        before += len(document.text)
        if 0 < position < len(document.text):
            position = _boundary(document.text, position, max(0, position - longest_search))
        parts = document.text[:position], document.text[position:]
        head, tail = (replace(document, text=part) if part and not part.isspace() else None for part in parts)
        yield head, tail


def _boundary(text: str, position: int, first: int) -> int:
    """The position behind the last line break between two positions, or behind the last space; else the latter."""
    line = text.rfind("\n", first, position)
    if line >= 0:
        return line + 1
    return next((end for end in range(position, first, -1) if text[end - 1].isspace()), position)
