"""Data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator

from prism_lightning.common.errors import UserError
from prism_lightning.data.sources.chat import Chat
from prism_lightning.data.sources.column import TextColumn
from prism_lightning.data.sources.source import Document, RecordError, Source, row_place


def hub_dataset(
    name: str,
    config: str | None,
    split: str,
    revision: str | None,
    text_column: str,
    chat_template: str | None = None,
) -> Source:
    """A Hugging Face dataset, streamed: nothing is stored but the tokens made from it.

    Raises:
        UserError: while reading: the data set cannot be reached, or a row has no text.
    """
    column = TextColumn(text_column, Chat.of(chat_template))

    def records() -> Iterator[Document | None]:
        import datasets

        try:
            rows = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
            for row, value in column.values(enumerate(rows), row_place):
                text = column.text(value, row_place(row))
                yield None if text is None else Document(text, name, name, row)
        except RecordError as error:
            raise UserError(f"data.dataset {name}{error.where}: {error.problem}") from error
        except Exception as error:  # network, authentication and naming errors come in many types
            cause = " ".join(str(error).split())[:200]
            raise UserError(
                f"data.dataset {name} (split {split}) could not be read: {cause};"
                " without a network, give local files by --data.path"
            ) from error

    identity = {"dataset": name, "config": config, "split": split, "revision": revision}
    return Source(identity | column.identity, records)
