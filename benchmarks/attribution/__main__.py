"""Prototype attribution against EK-FAC, TRAK, a cached gradient index and simpler methods: quality, cost, memory.

python -m benchmarks.attribution --config benchmarks/attribution/tinystories.yaml corpus.path=stories.jsonl
python -m benchmarks.attribution --config benchmarks/attribution/quickstart.yaml
python -m benchmarks.attribution --config benchmarks/attribution/smoke.yaml

Trains and retrains what the configuration asks for, scores, times, and writes a report with tables, plots and a JSON
file. Everything is stored under `out`, and the same command resumes an interrupted run. Settings after the
configuration override it, e.g. retraining.jobs=8. Nothing else should run on a machine that measures costs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.attribution import planted
from benchmarks.attribution.config import load_settings
from benchmarks.attribution.cost import Cost
from benchmarks.attribution.quality import Quality, checks
from benchmarks.attribution.report import write_report
from prism_lightning.common.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run the stages of the configuration; return the exit code, 2 after an error that the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attribution",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML file of the run, see benchmarks/attribution/*.yaml."
    )
    parser.add_argument("settings", nargs="*", help="Settings that override the file, as group.name=value.")
    options = parser.parse_args(arguments)
    try:
        run = load_settings(options.config, options.settings)
        results: dict[str, Any] = {}
        methods = {name: {k: v for k, v in m.items() if k != "sweep"} for name, m in run.methods.items()}
        if run.quality is not None:
            quality = Quality(run)
            results["quality"] = checks(quality)
            methods = {name: settings for name, (settings, _) in quality.chosen.items()}
        if run.planted:
            results["planted"] = planted.measure(run, methods)
        if run.cost is not None:
            results["cost"] = Cost(run, methods).all_sizes()
        print(f"wrote {write_report(run, results)}")
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command resumes where this one stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
