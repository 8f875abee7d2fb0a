"""Opening an index of either kind, by its setting `space`. Numpy only."""

from __future__ import annotations

from pathlib import Path

from prism_lightning.attribution.index.base import Index, manifest_of
from prism_lightning.attribution.index.hidden_influence import HiddenIndex
from prism_lightning.attribution.index.logit_influence import LogitIndex

INDEXES: dict[str, type[Index]] = {"hidden": HiddenIndex, "logits": LogitIndex}


def open_index(folder: str | Path, verify: bool = True) -> Index:
    """Return the index in a folder; see `Index` for arguments and errors."""
    return INDEXES[manifest_of(Path(folder))["settings"]["space"]](folder, verify)
