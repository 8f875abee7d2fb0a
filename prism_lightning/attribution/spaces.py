"""The two kinds of index, by the setting `space`. Numpy only."""

from __future__ import annotations

from pathlib import Path

from prism_lightning.attribution.hidden_index import HiddenIndex
from prism_lightning.attribution.index import Index
from prism_lightning.attribution.logit_index import LogitIndex
from prism_lightning.common.files import read_json

INDEXES: dict[str, type[Index]] = {"hidden": HiddenIndex, "logits": LogitIndex}


def open_index(folder: str | Path, verify: bool = True) -> Index:
    """The index in a folder. Arguments and errors as of `Index`."""
    manifest = read_json(Path(folder) / "manifest.json") or {}
    space = manifest.get("settings", {}).get("space")
    return INDEXES.get(space, LogitIndex)(folder, verify)  # which says what is wrong with another
