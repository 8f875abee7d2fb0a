"""Documents, sources of documents, and the error that readers raise about a record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Document:
    """One text and its origin: a file, or a row of a file or data set.

    Attributes:
        text: the text.
        name: the file's path, or the name of the data set.
        key: the name without the folder of the corpus, so that a corpus that was moved is still the same.
        row: counted from 0. In JSON Lines, lines count, including blank ones; in JSON, objects; in CSV and TSV, records
            after the header; in Parquet, Arrow and hub data, rows. A text file has row 0 only.
        prompt_length: characters of the text that are the prompt of a completion; None where there is no prompt.
        messages: the chat that the tokenizer's template renders; None where the text is what is tokenised.
    """

    text: str
    name: str
    key: str
    row: int = 0
    prompt_length: int | None = None
    messages: list[dict[str, Any]] | None = None


@dataclass
class Source:
    """Documents in a fixed order, and an identity that changes when they do.

    Args:
        identity: everything that the documents depend on, as JSON.
        records: starts a pass over the records; it yields None for a record whose text is null.
        unread_files: files in folders that hold no text.
        skipped_nulls: number of records without text so far in the last pass.
        masked: whether the documents have masked targets: prompts, or turns of a chat that are not the assistant's.
    """

    identity: dict[str, Any]
    records: Callable[[], Iterator[Document | None]]
    unread_files: list[str] = field(default_factory=list)
    skipped_nulls: int = 0
    masked: bool = False

    def documents(self) -> Iterator[Document]:
        """Yield every document with text; blank ones are skipped, nulls are skipped and counted."""
        self.skipped_nulls = 0
        for document in self.records():
            if document is None:
                self.skipped_nulls += 1
            elif document.text and not document.text.isspace():  # strip() would copy a long text.
                yield document


class RecordError(Exception):
    """A problem with one record. Readers raise it, since they do not know the name of the file.

    Args:
        where: place that is appended to the file's name: ":3" for line 3, " row 2", ", byte 7", or "".
        problem: what is wrong, and the fix.
    """

    def __init__(self, where: str, problem: str) -> None:
        self.where, self.problem = where, problem
        super().__init__(where, problem)


def row_place(row: int) -> str:
    """Return the place of a record in a file or data set without lines."""
    return f" row {row}"


def line_place(row: int) -> str:
    """Return the place of a record in a JSON Lines file; like editors, it counts lines from 1."""
    return f":{row + 1}"
