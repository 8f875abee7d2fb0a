"""Options of a command line, generated from dataclasses.

Every field becomes a flag: its type and default are the flag's, its text in the docstring is the flag's help. So each
default and each text is stated once. The module imports nothing heavy, which `--help` relies on.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Options = TypeVar("Options")


def add_options(parser: argparse.ArgumentParser, *classes: type) -> None:
    """Add a flag for every field of some dataclasses.

    A field without a default is required. A field that holds a list takes one or more values.

    Args:
        parser: The parser of a verb.
        classes: Dataclasses whose docstrings have a section "Attributes".
    """
    for cls in classes:
        texts, types = attribute_texts(cls), get_type_hints(cls)
        for field in fields(cls):
            value_type, several = _value_type(types[field.name])
            parser.add_argument(
                f"--{field.name}",
                type=value_type,
                nargs="+" if several else None,
                default=None if field.default is MISSING else field.default,
                required=field.default is MISSING,
                help=_help(texts.get(field.name, ""), field),
            )


def parsed_options(parser: argparse.ArgumentParser, values: argparse.Namespace, cls: Callable[..., Options]) -> Options:
    """Return an instance of a dataclass from parsed flags; exit with 2 where its constructor raises ValueError."""
    try:
        return cls(**{field.name: getattr(values, field.name) for field in fields(cls)})  # type: ignore[arg-type]
    except ValueError as error:
        parser.error(str(error))


def attribute_texts(cls: type) -> dict[str, str]:
    """Return the text of every attribute in the section "Attributes" of a docstring."""
    section = re.search(r"^Attributes:\n((?:    .*\n?)+)", inspect.getdoc(cls) or "", re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _value_type(annotation: Any) -> tuple[Callable[[str], Any], bool]:
    """Return the type of a flag's value, and whether it takes several values."""
    alternatives = [alternative for alternative in get_args(annotation) if alternative is not type(None)]
    if get_origin(annotation) is list:
        return alternatives[0], True
    return _value_type(alternatives[0]) if alternatives else (annotation, False)


def _help(text: str, field: Field[Any]) -> str:
    if field.default not in (MISSING, None):
        default = f"{field.default:,}" if isinstance(field.default, int) else f"{field.default}"
        text = f"{text.removesuffix('.')} (default {default})."
    return text.replace("%", "%%")
