"""The text that is held out for validation: whole documents chosen by their identity, or the end of the text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

from prism_lightning.data.sources import Document, Source


def in_validation(document: Document, fraction: float) -> bool:
    """Return whether a document belongs to validation. Only its key and row decide, not order, seed or other documents.

    Runs with different seeds are therefore validated on the same text and share one prepared folder.
    """
    key = f"0\0{document.key}\0{document.row}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < fraction * 2**64


def end_held_out(source: Source, fraction: float) -> int | None:
    """Return how many characters precede the held-out end of the text; None where whole documents are held out.

    The end is held out if all documents would be in the same split, as with one document or a few. Otherwise reading
    stops at the first document of a second split, after about 1 / fraction documents.
    """
    characters, splits = 0, set()
    for document in source.documents():
        splits.add(in_validation(document, fraction))
        if len(splits) == 2:
            return None
        characters += len(document.text)
    held_out = max(round(characters * fraction), int(source.masked))  # documents with masked targets stay whole
    return characters - held_out if splits else None


def tagged(
    source: Source, validation: Source | None, fraction: float, end: int | None
) -> Iterator[tuple[str, Document]]:
    """Yield every document with its split, "train" or "validation".

    A validation source, or the held-out end of the text, comes first, so that a limit of tokens does not cut it.

    Args:
        source: the training text; without `validation`, all text.
        validation: the validation text, if it has a source of its own.
        fraction: share of the documents that are held out without `validation`.
        end: result of `end_held_out`.
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
    """Yield the parts of every document before and after the cut; None for a part that is blank."""
    before = 0
    longest_search = round(end / (1 - fraction) * fraction / 2)  # Holds out at most half as much again as requested.
    for document in source.documents():
        position = min(max(end - before, 0), len(document.text))
        before += len(document.text)
        if source.masked:  # Half a chat or prompt would have other targets; the document is held out whole.
            yield (None, document) if position < len(document.text) else (document, None)
            continue
        if 0 < position < len(document.text):
            position = _boundary(document.text, position, max(0, position - longest_search))
        parts = document.text[:position], document.text[position:]
        head, tail = (replace(document, text=part) if part and not part.isspace() else None for part in parts)
        yield head, tail


def _boundary(text: str, position: int, first: int) -> int:
    """Return the place after the last newline, else after the last space, from `first` on; else `position`."""
    line = text.rfind("\n", first, position)
    if line >= 0:
        return line + 1
    return next((end for end in range(position, first, -1) if text[end - 1].isspace()), position)
