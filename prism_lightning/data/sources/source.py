"""Documents, sources of them, and what a reader raises about one record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Document:
    """One text and where it came from: a file, or a row of a file or data set.

    `key` names the source without the folder the corpus lies in, so that a corpus that moved is still the same.
    `row` counts from 0: the lines of a JSON Lines file, blank lines included; the objects of a JSON file; the records
    of a CSV or TSV file, its header not included; the rows of Parquet, Arrow and hub data. It is 0 in a text file.
    """

    text: str
    name: str
    key: str
    row: int = 0


@dataclass
class Source:
    """Documents in a fixed order, and an identity that changes when they do.

    Args:
        identity: what the documents depend on, as JSON.
        records: starts a pass over the records; None stands for a record whose text is null.
        unread_files: files of a folder that hold no text.
        skipped_nulls: records without text in the last pass, as far as it went.
    """

    identity: dict[str, Any]
    records: Callable[[], Iterator[Document | None]]
    unread_files: list[str] = field(default_factory=list)
    skipped_nulls: int = 0

    def documents(self) -> Iterator[Document]:
        """Every document with text; blank ones are skipped, nulls are skipped and counted."""
        self.skipped_nulls = 0
        for document in self.records():
            if document is None:
                self.skipped_nulls += 1
            elif document.text and not document.text.isspace():  # strip() would copy a long text
                yield document


class RecordError(Exception):
    """A problem with one record, raised by readers, which do not know the name of the file.

    Args:
        where: follows the name of the file: ":3" for line 3, " row 2", ", byte 7", or nothing.
        problem: what is wrong, and the fix.
    """

    def __init__(self, where: str, problem: str) -> None:
        self.where, self.problem = where, problem
        super().__init__(where, problem)


def row_place(row: int) -> str:
    """Where a record stands in a file or data set without lines."""
    return f" row {row}"


def line_place(row: int) -> str:
    """Where a record of a JSON Lines file stands: editors count lines from 1."""
    return f":{row + 1}"
