"""JSON as every verb prints and every file holds it. Nothing that takes time to import."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any


def as_json(content: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """JSON that every reader takes: a number that is not finite becomes null; JSON knows no NaN and no Infinity.

    `default` is json.dumps's: what stands for a value that JSON has no type for.
    """
    return json.dumps(_finite(content), indent=indent, default=default, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content
