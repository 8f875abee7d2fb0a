"""The column that holds the text: located by name or dotted path, its values converted to text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prism_lightning.common.errors import nearest
from prism_lightning.data.sources.chat import Chat, is_chat
from prism_lightning.data.sources.source import RecordError

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell what no encoding takes.
NAMES_SHOWN = 20


@dataclass(frozen=True)
class TextColumn:
    """The column that holds the text.

    Args:
        name: a column, or a dotted path to a field inside one; a column with the whole name takes precedence.
        chat: renders lists of chat messages.
        setting: the setting that named the column, for error messages.
    """

    name: str
    chat: Chat = field(default_factory=Chat)
    setting: str = "data.text_column"

    @property
    def identity(self) -> dict[str, str]:
        """Settings that the texts depend on; the chat template only where one is set."""
        template = {"chat_template": self.chat.template} if self.chat.template is not None else {}
        return {"text_column": self.name} | template

    def path_in(self, names: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Return the keys that lead to the column, or to a null above it; None where the column is missing.

        Args:
            names: a record, or a schema as nested mappings.
        """
        return _path(self.name, names)

    def required_path(self, names: Mapping[str, Any], where: str = "") -> tuple[str, ...]:
        """Return the keys that lead to the column, as `path_in` does.

        Raises:
            RecordError: the column is missing.
        """
        path = self.path_in(names)
        if path is None:
            known = difflib.get_close_matches(self.name, _paths(names), n=NAMES_SHOWN, cutoff=0)
            hint = nearest(self.name, known) if known else "there are no columns"
            raise RecordError(where, f"no column {self.name!r} ({self.setting}): {hint}")
        return path

    def values(self, records: Iterable[tuple[int, Any]], place: Callable[[int], str]) -> Iterator[tuple[int, Any]]:
        """Yield row and value of every record; a column that is missing after the first record counts as null.

        Args:
            records: row and record of each.
            place: returns where a row stands, for error messages.

        Raises:
            RecordError: a record is no object; the column is missing in the first record.
        """
        first = True
        for row, record in records:
            if not isinstance(record, dict):
                raise RecordError(place(row), f"{describe(record)}, not an object: give objects with {self.name!r}")
            path = self.required_path(record, place(row)) if first else self.path_in(record)
            first = False
            value: Any = record
            for key in path or ():
                value = value[key]
            yield row, None if path is None else value

    def text(self, value: Any, where: str) -> str | None:
        """Return the text of a value; None for a null.

        Raises:
            RecordError: the value is neither text nor a list of chat messages.
        """
        if value is None:
            return None
        if isinstance(value, str):
            check_surrogates(value, where)
            return value
        if is_chat(value):
            return self.text(self.chat.render(value, where), where)
        raise self.wrong_value(value, where, self._advice(value))

    def wrong_value(self, value: Any, where: str, advice: str, expected: str = "text") -> RecordError:
        """Return the error for a value of another kind."""
        return RecordError(where, f"column {self.name!r} is not {expected} but {describe(value)}: {advice}")

    def _advice(self, value: Any) -> str:
        if isinstance(value, dict):
            paths = [path for path in _paths(value) if _is_readable(value, path)]
            best = min(paths, key=lambda path: path.rpartition(".")[2] not in ("text", "content"), default=None)
            return f"set {self.setting} {self.name}.{best}" if best else "give a column that holds text"
        if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
            return "join the strings into one text per row"
        if isinstance(value, list | tuple) and value and all(isinstance(item, dict) for item in value):
            return "chat messages are objects with role and content; rename the fields, or write one text per row"
        return f"set {self.setting} to a column that holds text"


def check_surrogates(text: str, where: str) -> None:
    """Raise RecordError for a text with half a surrogate pair."""
    if not text.isascii() and LONE_SURROGATE.search(text):
        raise RecordError(where, "half a surrogate pair stands alone: correct or remove the text")


def describe(value: Any) -> str:
    """Return what kind of value this is, in terms of JSON."""
    if isinstance(value, dict):
        return f"an object with {', '.join(list(map(str, value))[:NAMES_SHOWN])}" if value else "an empty object"
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, str) for item in value):
            return "a list of strings"
        return f"a list, its first item {describe(value[0])}" if value else "an empty list"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", bytes: "bytes"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _path(name: str, names: Mapping[str, Any]) -> tuple[str, ...] | None:
    if name in names:
        return (name,)
    for dot in re.finditer(r"\.", name):
        head, rest = name[: dot.start()], name[dot.end() :]
        if head in names:
            if names[head] is None:
                return (head,)
            nested_path = _path(rest, names[head]) if isinstance(names[head], Mapping) else None
            if nested_path:
                return (head, *nested_path)
    return None


def _paths(names: Mapping[str, Any]) -> list[str]:
    """Return the dotted paths of all fields, including those of nested objects."""
    paths = [str(name) for name in names]
    for name, value in names.items():
        if isinstance(value, Mapping):
            paths += [f"{name}.{path}" for path in _paths(value)]
    return paths


def _is_readable(record: Mapping[str, Any], path: str) -> bool:
    value: Any = record
    for key in _path(path, record) or ():
        value = value[key]
    return isinstance(value, str) or is_chat(value)
