"""Counts in short form."""

from __future__ import annotations


def format_count(number: float) -> str:
    """Return a count with three significant digits and a unit: 1,350,400 as "1.35M"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
