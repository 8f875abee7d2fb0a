"""Typed checks of small JSON files: a kind for each entry, and a one-line message for the first wrong entry.

```python
FIELDS = {"tokens": whole(1), "settings": mapping({"space": text()})}
facts = read_manifest(path, FIELDS, "run the same `index` command")
```

A file may have more entries than are named; these are ignored. The module needs no numpy and imports quickly.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prism_lightning.common.errors import UserError, visible
from prism_lightning.common.files import read_json

TEXT_LENGTH = 4096  # characters of a path or name; no path on Linux is longer
LARGEST = 2**53  # Every JSON reader keeps whole numbers up to this exactly.


class Kind(NamedTuple):
    """The kind of an entry.

    Attributes:
        expected: what is expected, in words that follow "expected".
        problem: returns a value's problem as the path of the wrong entry and a message; None where there is none.
    """

    expected: str
    problem: Callable[[Any], tuple[str, str] | None]


def whole(low: int = 0, high: int = LARGEST) -> Kind:
    """Return the kind of whole numbers from `low` to `high`."""
    bounds = f" from {low:,} to {high:,}" if high != LARGEST else f" of at least {low:,}" if low > -LARGEST else ""
    return _kind(f"a whole number{bounds}", lambda value: type(value) is int and low <= value <= high)


def number(low: float = -math.inf, high: float = math.inf) -> Kind:
    """Return the kind of finite numbers from `low` to `high`."""
    bounds = "" if math.isinf(low) and math.isinf(high) else f" from {low:g} to {high:g}"
    return _kind(f"a finite number{bounds}", lambda value: _finite(value) and low <= value <= high)


def text() -> Kind:
    """Return the kind of texts of at most TEXT_LENGTH characters."""
    return _kind("a text", lambda value: isinstance(value, str) and len(value) <= TEXT_LENGTH)


def flag() -> Kind:
    """Return the kind of true and false."""
    return _kind("true or false", lambda value: isinstance(value, bool))


def one_of(*values: Any) -> Kind:
    """Return the kind of values that equal one of these; true does not equal 1."""
    expected = " or ".join(map(repr, values))
    return _kind(expected, lambda value: any(type(value) is type(v) and value == v for v in values))


def anything() -> Kind:
    """Return the kind of any value except null."""
    return _kind("a value", lambda value: value is not None)


def optional(kind: Kind) -> Kind:
    """Return a kind that also allows null or a missing entry."""
    return Kind(f"{kind.expected} or null", lambda value: None if value is None else kind.problem(value))


def listed(kind: Kind) -> Kind:
    """Return the kind of lists whose items are all of one kind."""

    def problem(value: Any) -> tuple[str, str] | None:
        if not isinstance(value, list):
            return "", _message(value, "a list")
        return _first_problem((f"[{number}]", item, kind) for number, item in enumerate(value))

    return Kind("a list", problem)


def pair() -> Kind:
    """Return the kind of lists of two finite numbers: the ends of an interval."""
    return _kind(
        "two finite numbers", lambda value: isinstance(value, list) and len(value) == 2 and all(map(_finite, value))
    )


def mapping(fields: Mapping[str, Kind]) -> Kind:
    """Return the kind of objects with these entries."""

    def problem(value: Any) -> tuple[str, str] | None:
        if not isinstance(value, dict):
            return "", _message(value, "a JSON object")
        return _first_problem((f".{name}", value.get(name, MISSING), kind) for name, kind in fields.items())

    return Kind("a JSON object", problem)


def mapping_of(kind: Kind) -> Kind:
    """Return the kind of objects whose entries have any name and are all of one kind."""

    def problem(value: Any) -> tuple[str, str] | None:
        if not isinstance(value, dict):
            return "", _message(value, "a JSON object")
        return _first_problem((f".{name}", item, kind) for name, item in value.items())

    return Kind("a JSON object", problem)


def problem_in(content: Any, fields: Mapping[str, Kind]) -> str | None:
    """Return a message about the first entry that is missing or of another kind; None where all entries are right."""
    problem = mapping(fields).problem(content)
    if problem is None:
        return None
    entry, message = problem
    return visible(f"{entry.removeprefix('.')[:200]} {message}".strip())


def check_manifest(content: Any, fields: Mapping[str, Kind], path: Path, advice: str) -> dict[str, Any]:
    """Return the content of a file after checking that every entry is of its kind.

    Args:
        content: of the file.
        fields: kind of each entry.
        path: of the file, for the message.
        advice: what to do if the file is damaged.

    Raises:
        UserError: an entry is missing or of another kind. The message names the file and the first such entry.
    """
    problem = problem_in(content, fields)
    if problem is not None:
        raise UserError(f"{path} is damaged ({problem}): {advice}")
    return content


def read_manifest(path: Path, fields: Mapping[str, Kind], advice: str) -> dict[str, Any] | None:
    """Return the checked content of a JSON file; None where it is missing. Raises as `check_manifest` does."""
    if not path.is_file():
        return None
    content = read_json(path)
    if content is None:
        raise UserError(f"{path} is damaged (it is no JSON object): {advice}")
    return check_manifest(content, fields, path, advice)


class _Missing:
    """Stands for a missing entry."""


MISSING = _Missing()


def _kind(expected: str, accepts: Callable[[Any], bool]) -> Kind:
    return Kind(expected, lambda value: None if accepts(value) else ("", _message(value, expected)))


def _first_problem(entries: Iterable[tuple[str, Any, Kind]]) -> tuple[str, str] | None:
    for name, value, kind in entries:
        if value is MISSING:
            if kind.problem(None) is None:  # The kind is optional.
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
