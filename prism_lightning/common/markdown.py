"""Markdown of plain text and of tables; text is escaped, so that nothing in it becomes markup."""

from __future__ import annotations

import re
from collections.abc import Iterable


def escaped(text: str) -> str:
    """Return plain text escaped for Markdown, on one line."""
    return re.sub(r"([\\`*_\[\]#])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " "))


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table of plain texts."""
    columns = list(columns)
    lines = [map(_cell, columns), ["---"] * len(columns), *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    return escaped(text).replace("|", "\\|")
