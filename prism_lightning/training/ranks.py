"""Which of a run's processes this is."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_only


def first_process() -> bool:
    """Whether this process writes what a run needs once: its directory, its MLflow store."""
    return getattr(rank_zero_only, "rank", 0) == 0
