"""The verb sweep: plan, run, status, results of a grid of runs."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_lightning.common.errors import UserError

if TYPE_CHECKING:
    from prism_lightning.sweeps.running import Work
    from prism_lightning.sweeps.trials import Trial

EXAMPLES = """examples:
  sweep plan    --config recipes/sweeps/ladder_cpu.yaml
  sweep run     --config recipes/sweeps/ladder_cpu.yaml --jobs 2 --data.path 'stories/*.jsonl'
  sweep run     --config recipes/sweeps/ladder.yaml --slurm gpus_per_node=8 timeout_min=2880
  sweep status  --config recipes/sweeps/ladder_cpu.yaml
  sweep results --config recipes/sweeps/ladder_cpu.yaml --out report

Settings such as --data.path are given to every trial's fit, over the sweep file's own. Trials that are finished are
skipped, others go on where they stopped: the same command again is how to retry, after a crash too."""


def sweep(arguments: list[str]) -> None:
    """One of plan, run, status and results."""
    parser = argparse.ArgumentParser(
        prog="python -m prism_lightning sweep",
        description="A grid of runs: each trial is a fit and an evaluate that one could type.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=("plan", "run", "status", "results"))
    parser.add_argument("--config", type=Path, required=True, help="sweep file, see recipes/sweeps/*.yaml")
    parser.add_argument("--device", default="cpu-2-cores", help="plan: whose speed hours are stated for")
    parser.add_argument("--commands", action="store_true", help="plan: print every command instead of the table")
    parser.add_argument("--data_dir", help="run: folder with TASK/SPLIT.jsonl for evaluations (default: the hub)")
    parser.add_argument("--limit", type=int, help="run: documents of each task at most")
    parser.add_argument("--jobs", type=int, default=1, help="run: trials at a time on this machine (default 1)")
    parser.add_argument("--retries", type=int, default=1, help="run: how often a trial that fails is tried again")
    parser.add_argument(
        "--slurm",
        nargs="+",
        metavar="NAME=VALUE",
        help="run: as SLURM jobs, and return at once; parameters as submitit names them, timeout_min among them",
    )
    parser.add_argument("--out", type=Path, help="results: write a report there too")
    options, rest = parser.parse_known_args(arguments)
    if options.jobs < 1 or options.retries < 0:
        parser.error("--jobs must be a positive number and --retries none below 0")

    from prism_lightning.config.compose import split_arguments
    from prism_lightning.sweeps.trials import trials_of

    _, overrides = split_arguments(["--config", str(options.config), *rest])
    trials = trials_of(options.config, overrides)
    {"plan": _plan, "run": _run, "status": _status, "results": _results}[options.what](trials, options)


def _evaluation(options: argparse.Namespace) -> list[str]:
    arguments = ["--data_dir", options.data_dir] if options.data_dir else []
    return arguments + (["--limit", str(options.limit)] if options.limit else [])


def _plan(trials: list[Trial], options: argparse.Namespace) -> None:
    from rich.table import Table

    from prism_lightning.common.console import console
    from prism_lightning.sweeps.planning import cost, device_speed
    from prism_lightning.sweeps.trials import spoken, typed

    if options.commands:
        for trial in trials:
            for command in trial.commands(_evaluation(options)):
                print(typed(command))
        return
    speed = device_speed(options.device)
    costs = [cost(trial, speed) for trial in trials]
    table = Table(show_edge=False)
    for column in ("trial", "parameters", "tokens", "steps", "FLOPs", "hours"):
        table.add_column(column, justify="left" if column == "trial" else "right", no_wrap=True)
    for trial, one in zip(trials, costs, strict=True):
        facts = (spoken(one.parameters), spoken(one.tokens), f"{trial.steps:,}", f"{one.flops:.2e}", f"{one.hours:.3f}")
        table.add_row(trial.name, *facts)
    table.add_section()
    tokens, flops, hours = (sum(getattr(one, name) for one in costs) for name in ("tokens", "flops", "hours"))
    table.add_row(f"{len(trials)} trials", "", spoken(tokens), "", f"{flops:.2e}", f"{hours:.3f}")
    console.print(table)
    console.print(
        f"Hours: of training on {options.device}, one trial after another; evaluation and start-up come on top."
    )


def _run(trials: list[Trial], options: argparse.Namespace) -> None:
    from prism_lightning.common.progress import PhaseProgress
    from prism_lightning.evaluation.suites import load_suites
    from prism_lightning.sweeps.parents import parent_run
    from prism_lightning.sweeps.planning import cost, device_speed
    from prism_lightning.sweeps.running import Runner, run_here, submit, work_of
    from prism_lightning.sweeps.states import standing

    load_suites(list(trials[0].suites))
    parameters = _parameters(options.slurm or [])
    uri = trials[0].config["run"]["tracking_uri"]
    if options.slurm and str(uri).startswith("sqlite"):
        raise UserError(
            "--slurm: nodes cannot share one SQLite file: give --run.tracking_uri http://SERVER, or null for a"
            " database in each run directory"
        )
    flops = {trial.name: cost(trial, device_speed(options.device)).flops for trial in trials}  # finds every bad recipe
    states = {trial.name: standing(trial, list(trial.commands(_evaluation(options)))).state for trial in trials}
    for state in ("finished", "submitted"):
        names = [name for name, found in states.items() if found == state]
        if names:
            print(f"{state}, skipped: {', '.join(names)}", flush=True)
    due = [trial for trial in trials if states[trial.name] not in ("finished", "submitted")]
    if not due:
        return
    folder = due[0].run.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the sweep's dir {folder} cannot be made ({error.strerror}): choose another") from error
    if uri:
        parent_run(folder, uri)
    threads = 0 if options.slurm else max(1, (os.cpu_count() or 1) // options.jobs)
    works = [work_of(trial, _evaluation(options), threads) for trial in due]
    runner = Runner(folder, uri)
    if options.slurm:
        ids = submit(works, runner, "slurm", parameters)
        print(f"submitted {len(ids)} jobs: {' '.join(ids)}; `sweep status` tells how they do")
        return
    telling = _Telling({t.name: flops[t.name] for t in due})
    with PhaseProgress() as progress:
        progress("trials", 0, len(works))

        def report(work: Work, code: int) -> None:
            telling(work, code)
            progress("trials", telling.ended, len(works))

        run_here(works, runner, options.jobs, options.retries, report)


def _parameters(pairs: list[str]) -> dict[str, Any]:
    import yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--slurm {pair}: write NAME=VALUE")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--slurm {pair}: {value!r} is no value") from error
    return found


class _Telling:
    """A line for each trial that ends, with the time that the rest will take at the pace so far."""

    def __init__(self, flops: dict[str, float]) -> None:
        self.left, self.started = flops, time.time()
        self.total = sum(flops.values())
        self.count, self.ended = len(flops), 0
        print(f"{self.count} trials, {self.total:.2e} FLOPs", flush=True)

    def __call__(self, work: Work, code: int) -> None:
        """Tell of a trial."""
        from prism_lightning.sweeps.running import ELSEWHERE

        passed = time.time() - self.started
        if code == ELSEWHERE:
            print(f"{work.name} is being run by another process, skipped", flush=True)
            return
        if code:
            print(f"{work.name} failed ({code}): {work.log}", flush=True)
            return
        self.ended += 1
        self.left.pop(work.name)
        remaining = sum(self.left.values())
        # Half by FLOPs, half by trials: of a small model's minutes start-up and evaluation are most, of a large one's
        # training is. By FLOPs alone a ladder of 75 minutes was said to take 700.
        by_flops, by_trials = remaining / max(self.total - remaining, 1), len(self.left) / self.ended
        more = passed * (by_flops + by_trials) / 2
        rest = f", about {more / 60:.0f} min left" if remaining else ""
        print(f"[{self.ended}/{self.count}] {work.name} finished after {passed / 60:.1f} min{rest}", flush=True)


def _status(trials: list[Trial], options: argparse.Namespace) -> None:
    from rich.table import Table
    from rich.text import Text

    from prism_lightning.common.console import console
    from prism_lightning.sweeps.states import standing

    found = {trial.name: standing(trial) for trial in trials}
    table = Table("trial", "state", "", show_edge=False)
    for name, one in found.items():
        table.add_row(name, one.state, Text(one.note))
    console.print(table)
    states = [one.state for one in found.values()]
    console.print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))


def _results(trials: list[Trial], options: argparse.Namespace) -> None:
    from rich.table import Table
    from rich.text import Text

    from prism_lightning.cli.report import report
    from prism_lightning.common.console import console
    from prism_lightning.evaluation.suites import load_suite
    from prism_lightning.reporting.runs import find_runs
    from prism_lightning.reporting.tables import run_tables

    folder = trials[0].run.parent
    suites = sorted({suite for trial in trials for suite in trial.suites})
    runs, left_out = find_runs([folder])
    for shown in run_tables(runs, {str(path): load_suite(path) for path in suites}):
        table = Table(*shown.columns, title=shown.title, title_justify="left", show_edge=False)
        for row in shown.rows:
            table.add_row(*map(Text, row))
        console.print(table)
    for line in left_out:
        console.print(f"left out: {line}", markup=False)
    if options.out:
        chosen = ["--suites", *map(str, suites)] if suites else []
        report(["--runs", str(folder), "--out", str(options.out), *chosen])
