"""How the values of a row become a document: plain text, a prompt with its completion, or a chat."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from prism_lightning.data.sources.chat import Chat, is_chat, template_of
from prism_lightning.data.sources.column import TextColumn, check_surrogates
from prism_lightning.data.sources.source import Document

CHAT_ADVICE = "give a column with lists of objects that have role and content"


class Content(NamedTuple):
    """What a document says; the fields are those of `Document`."""

    text: str
    prompt_length: int | None = None
    messages: list[dict[str, Any]] | None = None


def document_of(content: Content, name: str, key: str, row: int) -> Document:
    """Return the document with a content; the other arguments are those of `Document`."""
    return Document(content.text, name, key, row, content.prompt_length, content.messages)


class Rows(ABC):
    """The columns that are read of every row, and how their values become a document.

    `masked` says whether the documents have masked targets.
    """

    masked = True
    columns: tuple[TextColumn, ...]

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Settings that the documents depend on."""

    @abstractmethod
    def content(self, values: Sequence[Any], where: str) -> Content | None:
        """Return the content of a row from its columns' values; None where a value is null.

        Raises:
            RecordError: a value is of the wrong kind.
        """


class TextRows(Rows):
    """Plain text: every token is a target."""

    masked = False

    def __init__(self, text_column: str, chat_template: str | None = None) -> None:
        self.columns = (TextColumn(text_column, Chat.of(chat_template)),)

    @property
    def identity(self) -> dict[str, Any]:
        return dict(self.columns[0].identity)

    def content(self, values: Sequence[Any], where: str) -> Content | None:
        text = self.columns[0].text(values[0], where)
        return None if text is None else Content(text)


class CompletionRows(Rows):
    """A prompt and its completion; only the completion's tokens are targets."""

    def __init__(self, prompt_column: str, completion_column: str) -> None:
        self.columns = (
            TextColumn(prompt_column, setting="data.prompt_column"),
            TextColumn(completion_column, setting="data.completion_column"),
        )

    @property
    def identity(self) -> dict[str, Any]:
        prompt, completion = self.columns
        return {"prompt_column": prompt.name, "completion_column": completion.name}

    def content(self, values: Sequence[Any], where: str) -> Content | None:
        for column, value in zip(self.columns, values, strict=True):
            if is_chat(value):
                raise column.wrong_value(value, where, "give the whole chat in one column by data.messages_column")
        prompt, completion = (column.text(value, where) for column, value in zip(self.columns, values, strict=True))
        if prompt is None or completion is None:
            return None
        # A blank completion has nothing to learn; the row is skipped as one with blank text is.
        return Content(prompt + completion, len(prompt)) if completion and not completion.isspace() else Content("")


class MessageRows(Rows):
    """A chat, which the tokenizer's template renders; only the assistant's turns are targets."""

    def __init__(self, messages_column: str, chat_template: str | None = None) -> None:
        self.columns = (TextColumn(messages_column, setting="data.messages_column"),)
        self.chat_template = template_of(chat_template)  # not compiled here: tokenizers know more tags

    @property
    def identity(self) -> dict[str, Any]:
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return {"messages_column": self.columns[0].name} | template

    def content(self, values: Sequence[Any], where: str) -> Content | None:
        (value,) = values
        if value is None:
            return None
        if not is_chat(value):
            raise self.columns[0].wrong_value(value, where, CHAT_ADVICE, "a list of chat messages")
        messages = [_without_nulls(message) for message in value]
        check_surrogates(json.dumps(messages, ensure_ascii=False, default=str), where)
        contents = (message["content"] for message in messages)
        texts = [content if isinstance(content, str) else json.dumps(content, default=str) for content in contents]
        return Content("\n\n".join(text for text in texts if text), messages=messages)


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without empty fields, which tables have for all messages; templates test whether one is there.

    An empty content is "" unless the message calls tools, where templates expect a null.
    """
    filled = {name: value for name, value in message.items() if value is not None}
    return filled if "content" in filled else filled | {"content": None if filled.get("tool_calls") else ""}
