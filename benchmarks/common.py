"""The spread of repeats, and the output of a benchmark: a table and a JSON file with its provenance."""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prism_lightning.run.environment import environment


@dataclass
class Spread:
    """Median, lowest and highest value of several repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Return the spread of the given repeats."""
        return cls(statistics.median(values), min(values), max(values))

    def show(self, digits: int = 0) -> str:
        """Return the spread as "median (low to high)"."""
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


def finish(name: str, title: str, columns: list[str], rows: list[list[str]], results: Any, out: Path) -> None:
    """Print a table and write a benchmark's JSON file.

    Args:
        name: Name of the file, without its suffix.
        title, columns, rows: Content of the table.
        results: Value of the key "results", of JSON types and dataclasses' dictionaries.
        out: Folder of the file; it is created if it does not exist.
    """
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    content = {
        "results": results,
        "environment": environment(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
    path.write_text(json.dumps(content, indent=1))
    print(f"wrote {path}")


def processor() -> str:
    """Return the name of the GPU, or of the processor if torch can use no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
