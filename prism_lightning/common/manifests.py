"""Typed checks of small JSON files: what each entry must be, and one line that says what it is instead.

```python
FIELDS = {"tokens": whole(1), "settings": mapping({"space": text()})}
facts = read_manifest(path, FIELDS, "run the same `index` command")
```

A file may hold more entries than are named; these are not looked at. Numpy is not needed here, nor anything else that
takes time to import.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prism_lightning.common.errors import UserError, visible
from prism_lightning.common.files import read_json

TEXT_LENGTH = 4096  # characters of a path or name; Linux has no longer path
LARGEST = 2**53  # whole numbers that every JSON reader keeps exactly


class Kind(NamedTuple):
    """What an entry may be.

    Attributes:
        expected: in words, to follow "expected".
        problem: the entry's problem as (the entries on the way to it, a message); None where it is right.
    """

    expected: str
    problem: Callable[[Any], tuple[str, str] | None]


def whole(low: int = 0, high: int = LARGEST) -> Kind:
    """A whole number from `low` to `high`."""
    bounds = f" from {low:,} to {high:,}" if high != LARGEST else f" of at least {low:,}" if low > -LARGEST else ""
    return _kind(f"a whole number{bounds}", lambda value: type(value) is int and low <= value <= high)


def number(low: float = -math.inf, high: float = math.inf) -> Kind:
    """A finite number from `low` to `high`."""
    bounds = "" if math.isinf(low) and math.isinf(high) else f" from {low:g} to {high:g}"
    return _kind(f"a finite number{bounds}", lambda value: _finite(value) and low <= value <= high)


def text() -> Kind:
    """A text of at most TEXT_LENGTH characters."""
    return _kind("a text", lambda value: isinstance(value, str) and len(value) <= TEXT_LENGTH)


def flag() -> Kind:
    """True or false."""
    return _kind("true or false", lambda value: isinstance(value, bool))


def one_of(*values: Any) -> Kind:
    """One of some values; true is not 1."""
    expected = " or ".join(map(repr, values))
    return _kind(expected, lambda value: any(type(value) is type(v) and value == v for v in values))


def anything() -> Kind:
    """Any value but null."""
    return _kind("a value", lambda value: value is not None)


def optional(kind: Kind) -> Kind:
    """The kind, null, or no entry at all."""
    return Kind(f"{kind.expected} or null", lambda value: None if value is None else kind.problem(value))


def listed(kind: Kind) -> Kind:
    """A list whose items are all of a kind."""

    def problem(value: Any) -> tuple[str, str] | None:
        if not isinstance(value, list):
            return "", _message(value, "a list")
        return _first_problem((f"[{at}]", item, kind) for at, item in enumerate(value))

    return Kind("a list", problem)


def pair() -> Kind:
    """Two finite numbers: the ends of an interval."""
    return _kind(
        "two finite numbers", lambda value: isinstance(value, list) and len(value) == 2 and all(map(_finite, value))
    )


def mapping(fields: Mapping[str, Kind]) -> Kind:
    """An object with these entries."""

    def problem(value: Any) -> tuple[str, str] | None:
        if not isinstance(value, dict):
            return "", _message(value, "a JSON object")
        return _first_problem((f".{name}", value.get(name, MISSING), kind) for name, kind in fields.items())

    return Kind("a JSON object", problem)


def mapping_of(kind: Kind) -> Kind:
    """An object whose entries, however they are named, are all of a kind."""

    def problem(value: Any) -> tuple[str, str] | None:
        if not isinstance(value, dict):
            return "", _message(value, "a JSON object")
        return _first_problem((f".{name}", item, kind) for name, item in value.items())

    return Kind("a JSON object", problem)


def problem_in(content: Any, fields: Mapping[str, Kind]) -> str | None:
    """What is wrong with a file's content, in words: its first entry that is missing or of another kind."""
    problem = mapping(fields).problem(content)
    if problem is None:
        return None
    where, message = problem
    return visible(f"{where.removeprefix('.')[:200]} {message}".strip())


def check_manifest(content: Any, fields: Mapping[str, Kind], path: Path, advice: str) -> dict[str, Any]:
    """The content of a file, once every entry is what it must be.

    Args:
        content: of the file.
        fields: what each entry must be.
        path: of the file, for the message.
        advice: what to do where it is damaged.

    Raises:
        UserError: naming the file and the first entry that is missing or of another kind.
    """
    problem = problem_in(content, fields)
    if problem is not None:
        raise UserError(f"{path} is damaged ({problem}): {advice}")
    return content


def read_manifest(path: Path, fields: Mapping[str, Kind], advice: str) -> dict[str, Any] | None:
    """The checked content of a JSON file; None where there is no such file. Raises as `check_manifest` does."""
    if not path.is_file():
        return None
    content = read_json(path)
    if content is None:
        raise UserError(f"{path} is damaged (it is no JSON object): {advice}")
    return check_manifest(content, fields, path, advice)


class _Missing:
    """Stands for an entry that is not there."""


MISSING = _Missing()


def _kind(expected: str, accepts: Callable[[Any], bool]) -> Kind:
    return Kind(expected, lambda value: None if accepts(value) else ("", _message(value, expected)))


def _first_problem(entries: Iterable[tuple[str, Any, Kind]]) -> tuple[str, str] | None:
    for name, value, kind in entries:
        if value is MISSING:
            if kind.problem(None) is None:  # optional
                continue
            return name, "is missing"
        problem = kind.problem(value)
        if problem is not None:
            return name + problem[0], problem[1]
    return None


def _message(value: Any, expected: str) -> str:
    return f"is {'null' if value is None else reprlib.repr(value)}, expected {expected}"


def _finite(value: Any) -> bool:
    if type(value) is int:
        return -LARGEST <= value <= LARGEST
    return type(value) is float and math.isfinite(value)
