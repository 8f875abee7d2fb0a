"""JSON in the format that every verb prints and every file has. It imports quickly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any


def as_json(content: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """Return JSON that every reader accepts: NaN and infinite numbers, which JSON does not have, become null.

    Args:
        content: to write.
        indent: number of spaces of an indentation level; None for one line.
        default: returns a substitute for a value that has no type in JSON, as in json.dumps.
    """
    return json.dumps(_finite(content), indent=indent, default=default, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content
