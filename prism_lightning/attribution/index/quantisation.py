"""Quantisation of records' coordinates. Numpy only."""

from __future__ import annotations

import numpy as np


def quantised(coordinates: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return rows [n, m] in the given type and, for int8, the scale [n] of each row.

    Rows are whitened before, so that all directions have equal weight and one scale per row suffices.
    """
    if precision != "int8":
        return coordinates.astype(np.float16 if precision == "fp16" else np.float32), None
    # Scales are rounded first, so that the stored integers suit the stored scale.
    scales = (np.abs(coordinates).max(axis=1) / 127).astype(np.float16)
    safe = np.where(scales > 0, scales, 1).astype(np.float32)
    return np.rint(coordinates / safe[:, None]).clip(-127, 127).astype(np.int8), scales
