"""The origin of a result: commit, package versions, machine and command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "datasets",
    "deepspeed",
    "torchmetrics",
    "omegaconf",
    "jsonargparse",
    "mlflow",
)


def environment() -> dict[str, Any]:
    """Return commit, package versions, Python, machine and command, as JSON values."""
    return {
        "commit": _commit(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "command": sys.argv[1:],
    }


def _commit() -> str | None:
    """Return the commit of the source tree, with "+changes" if it is not clean; None outside a checkout."""
    source = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=source, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes.strip() else "")
