"""The two kinds of index, by the setting `space`. Numpy only."""

from __future__ import annotations

from pathlib import Path

from prism_lightning.attribution.index.base import Index, manifest_of
from prism_lightning.attribution.index.hidden import HiddenIndex
from prism_lightning.attribution.index.logits import LogitIndex

INDEXES: dict[str, type[Index]] = {"hidden": HiddenIndex, "logits": LogitIndex}


def open_index(folder: str | Path, verify: bool = True) -> Index:
    """The index in a folder. Arguments and errors as of `Index`."""
    return INDEXES[manifest_of(Path(folder))["settings"]["space"]](folder, verify)
