"""Markdown of plain text and of tables: nothing in a text is taken for markup."""

from __future__ import annotations

import re
from collections.abc import Iterable


def escaped(text: str) -> str:
    """Plain text, on one line."""
    return re.sub(r"([\\`*_\[\]#])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " "))


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of plain texts."""
    columns = list(columns)
    lines = [map(_cell, columns), ["---"] * len(columns), *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    return escaped(text).replace("|", "\\|")
