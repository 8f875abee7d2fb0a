"""Data sets of the Hugging Face hub as documents."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import tee

from prism_lightning.common.errors import UserError
from prism_lightning.data.sources.rows import Rows, TextRows, document_of
from prism_lightning.data.sources.source import Document, RecordError, Source, row_place


def hub_dataset(
    name: str,
    config: str | None,
    split: str,
    revision: str | None,
    rows: str | Rows,
    chat_template: str | None = None,
) -> Source:
    """Return a Hugging Face data set as a source; it is streamed, and only its tokens are stored.

    Args:
        name, config, split, revision: of the data set.
        rows: the column that holds the text, where a dotted path names a field inside it; or the columns of prompts and
            completions, or of chats.
        chat_template: Jinja template, or a file with one, that renders chat messages in the column of the text.

    Raises:
        UserError: the template is not valid. While reading: the data set cannot be read, or a row has no text.
    """
    rows = TextRows(rows, chat_template) if isinstance(rows, str) else rows

    def documents() -> Iterator[Document | None]:
        import datasets

        try:
            records = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
            copies = tee(enumerate(records), len(rows.columns))
            readers = [column.values(copy, row_place) for column, copy in zip(rows.columns, copies, strict=True)]
            for values in zip(*readers, strict=True):
                row = values[0][0]
                content = rows.content([value for _, value in values], row_place(row))
                yield content and document_of(content, name, name, row)
        except RecordError as error:
            raise UserError(f"data.dataset {name}{error.where}: {error.problem}") from error
        except Exception as error:  # Errors of the network, authentication and names have many types.
            cause = " ".join(str(error).split())[:200]
            raise UserError(
                f"data.dataset {name} (split {split}) could not be read: {cause};"
                " without a network, give local files by --data.path"
            ) from error

    identity = {"dataset": name, "config": config, "split": split, "revision": revision}
    return Source(identity | rows.identity, documents, masked=rows.masked)
