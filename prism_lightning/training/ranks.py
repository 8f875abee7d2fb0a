"""The rank of this process among those of a run."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_only


def first_process() -> bool:
    """Return whether this process has rank 0 and so writes the run directory and the MLflow store."""
    return getattr(rank_zero_only, "rank", 0) == 0
