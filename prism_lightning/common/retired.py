"""Settings of the index that earlier versions had. What they recorded still names them."""

from __future__ import annotations

from typing import Any

# Each lost to its default by agreement with retraining: docs/attribution.md has the table.
RETIRED_INDEX_SETTINGS: dict[str, Any] = {
    "activation_path": False,
    "objective": "cross_entropy",
    "curvature": "separable",
}


def retired_in(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the retired settings of an index that differ from the only value that is left."""
    return {
        name: settings[name]
        for name, value in RETIRED_INDEX_SETTINGS.items()
        if name in settings and settings[name] != value
    }
