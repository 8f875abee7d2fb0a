"""The verb report: tables and figures of finished runs, compared with what the paper reports."""

from __future__ import annotations

import argparse
import datetime
import glob
import sys
from pathlib import Path

from prism_lightning.common.errors import UserError

EXAMPLES = """examples:
  report --runs runs/ladder_cpu --out report
  report --runs runs/prism_1b runs/dense_1b --benchmarks benchmarks/attribution/results/*.json --out report

Run directories of `fit` and `retrofit` are searched for in the given folders and below. Every number comes from a run
or a benchmark file. If results are missing, their table lists the commands that produce them. The report consists of
report.md, report.html (a single page without scripts or external resources) and the figures."""


def report(arguments: list[str]) -> None:
    """Write a report of finished runs."""
    options = _parser().parse_args(arguments)

    from prism_lightning.common.progress import PhaseProgress
    from prism_lightning.evaluation.suites import load_suite
    from prism_lightning.reporting.attribution_tables import attribution_tables, read_benchmarks
    from prism_lightning.reporting.figures import draw_figures
    from prism_lightning.reporting.intervention_tables import intervention_tables, read_interventions
    from prism_lightning.reporting.page import Report, write_report
    from prism_lightning.reporting.paper import paper_table
    from prism_lightning.reporting.retrofits import find_retrofits, retrofit_table
    from prism_lightning.reporting.runs import find_runs
    from prism_lightning.reporting.scaling import fit_scaling_laws, scaling_table
    from prism_lightning.reporting.tables import run_table, run_tables

    files = options.suites or [Path(name) for name in sorted(glob.glob("evals/*.yaml"))]
    suites = {str(path): load_suite(path) for path in files}
    benchmarks = read_benchmarks(options.benchmarks)
    runs, left_out = find_runs(options.runs)
    retrofits, unreadable = find_retrofits(options.runs)
    left_out += unreadable
    if not runs and not retrofits:
        raise UserError(left_out)
    with PhaseProgress() as progress:
        scaling = fit_scaling_laws(runs, progress)
    interventions, damaged = read_interventions(runs)
    left_out += damaged
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    tables = [paper_table(runs, suites, benchmarks, interventions), *run_tables(runs, suites)] if runs else []
    tables += [scaling_table(scaling)] if len(runs) > 1 else []
    tables += [retrofit_table(retrofits)] if retrofits else []
    tables += attribution_tables(benchmarks)
    tables += [*intervention_tables(runs, interventions), run_table(runs)] if runs else []
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {options.out} cannot be created ({error.strerror}): choose another") from error
    head = f"{len(runs)} runs, {len(retrofits)} retrofits, {datetime.date.today().isoformat()}."
    if left_out:
        head += f" Left out: {'; '.join(left_out)}."
    figures = list(draw_figures(runs, scaling, options.out))
    content = Report("Prototype language models and their dense twins", head, tables, figures)
    for path in write_report(content, options.out):
        print(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m prism_lightning report",
        description="Collect finished runs into the paper's tables and figures.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="Run directories, or folders with them.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of the report; it is created if necessary.")
    parser.add_argument("--suites", nargs="+", type=Path, help="Suites whose tasks are shown (default: evals/*.yaml).")
    parser.add_argument(
        "--benchmarks", nargs="+", type=Path, default=[], help="JSON files written by benchmarks.attribution."
    )
    return parser
