"""LDS of an index whose dictionary is fitted and assigned by cosine, and by pursuit, over K and k.

python -m benchmarks.choices.encoders --config benchmarks/choices/encoders.yaml corpus.path=stories.jsonl

Retrains models on random halves, as `benchmarks.attribution` does, and resumes there. LDS: the rank correlation, over
these models, between a query's loss and the summed influence of the sequences in the half; mean over queries.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.attribution.config import load_settings
from benchmarks.attribution.quality import QUERY_KINDS, Quality
from benchmarks.common import finish


def dictionaries(quality: Quality) -> dict[str, dict[str, Any]]:
    """Return settings of the method `prototypes` by the name of a row."""
    rows: dict[str, dict[str, Any]] = {}
    for space, grid in quality.plan.grids.items():
        cells = product(grid["tokens_per_prototype"], grid["active"], ("cosine", "pursuit"))
        for share, active, encoder in cells:
            settings = {"space": space, "tokens_per_prototype": share, "active": active, "encoder": encoder}
            fitted = {"kind": "prototypes", "fit_steps": quality.plan.fit_steps} | settings
            rows[f"{space}, 1 per {share} tokens, k {active}, {encoder}"] = fitted
    return rows


def main() -> None:
    """Score every dictionary; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see benchmarks/choices/encoders.yaml.")
    parser.add_argument("settings", nargs="*", help="Settings that override the file, as group.name=value.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="Folder of the JSON file.")
    options = parser.parse_args()
    quality = Quality(load_settings(options.config, options.settings))
    rows = quality.rows(dictionaries(quality), quality.main, quality.size)
    cells = [
        [
            row["method"],
            f"{row['bytes_per_token']:.0f}",
            f"{row['unexplained_variance']:.3f}",
            *(row[kind].show() for kind in QUERY_KINDS),
        ]
        for row in rows
    ]
    columns = ["dictionary", "bytes per token", "unexplained variance", *(f"LDS, {kind}" for kind in QUERY_KINDS)]
    results = [row | {kind: row[kind].facts() for kind in QUERY_KINDS} for row in rows]
    finish("encoders", "Encoders of an index, judged by retraining", columns, cells, results, options.out)


if __name__ == "__main__":
    main()
