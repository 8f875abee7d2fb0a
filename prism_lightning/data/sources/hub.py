"""Data sets of the Hugging Face hub as documents."""

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
    """Return a Hugging Face data set as a source; it is streamed, and only its tokens are stored.

    Args:
        name, config, split, revision: of the data set.
        text_column: column that holds the text; a dotted path names a field inside it.
        chat_template: Jinja template, or a file with one, that renders rows of chat messages.

    Raises:
        UserError: the template is not valid. While reading: the data set cannot be read, or a row has no text.
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
        except Exception as error:  # Errors of the network, authentication and names have many types.
            cause = " ".join(str(error).split())[:200]
            raise UserError(
                f"data.dataset {name} (split {split}) could not be read: {cause};"
                " without a network, give local files by --data.path"
            ) from error

    identity = {"dataset": name, "config": config, "split": split, "revision": revision}
    return Source(identity | column.identity, records)
