"""The verb sweep: plan, run, inspect and collect a grid of runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_lightning.common.errors import UserError

if TYPE_CHECKING:
    from prism_lightning.sweeps.trials import SweepTrial

EXAMPLES = """examples:
  sweep plan    --config recipes/sweeps/ladder_cpu.yaml
  sweep run     --config recipes/sweeps/ladder_cpu.yaml --jobs 2 --data.path 'stories/*.jsonl'
  sweep run     --config recipes/sweeps/ladder.yaml --slurm gpus_per_node=8 timeout_min=2880
  sweep status  --config recipes/sweeps/ladder_cpu.yaml
  sweep results --config recipes/sweeps/ladder_cpu.yaml --out report

Settings such as --data.path apply to the `fit` of every trial and replace those of the sweep file. Repeat `sweep run`
to retry after a failure or a crash: it skips finished trials and resumes the others."""


def sweep(arguments: list[str]) -> None:
    """Run one of the actions plan, run, status and results."""
    parser = _parser()
    options, settings = parser.parse_known_args(arguments)
    if options.jobs < 1 or options.retries < 0:
        parser.error("--jobs must be at least 1 and --retries at least 0")

    from prism_lightning.config.compose import split_arguments
    from prism_lightning.sweeps.trials import load_trials

    _, overrides = split_arguments(["--config", str(options.config), *settings])
    trials = load_trials(options.config, overrides)
    actions = {"plan": _plan, "run": _run, "status": _status, "results": _results}
    actions[options.action](trials, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m prism_lightning sweep",
        description="Plan, run and collect a grid of runs. Each trial is one `fit` and one `evaluate` command.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=("plan", "run", "status", "results"), help="Action to take.")
    parser.add_argument("--config", type=Path, required=True, help="Sweep file, for example recipes/sweeps/*.yaml.")
    plan = parser.add_argument_group("plan")
    plan.add_argument("--device", default="cpu-2-cores", help="Device of the estimated hours (default cpu-2-cores).")
    plan.add_argument("--commands", action="store_true", help="Print every trial's commands instead of the table.")
    run = parser.add_argument_group("run")
    run.add_argument("--data_dir", help="Folder with TASK/SPLIT.jsonl for evaluations (default: the Hugging Face hub).")
    run.add_argument("--limit", type=int, help="Largest number of documents of each task (default: all).")
    run.add_argument("--jobs", type=int, default=1, help="Number of trials that run at the same time (default 1).")
    run.add_argument("--retries", type=int, default=1, help="Further attempts for a trial that fails (default 1).")
    run.add_argument(
        "--slurm",
        nargs="+",
        metavar="NAME=VALUE",
        help="Submit the trials as SLURM jobs and return at once. The values are parameters of submitit's executor;"
        " timeout_min, the time limit in minutes, is required.",
    )
    results = parser.add_argument_group("results")
    results.add_argument("--out", type=Path, help="Folder for a report (default: tables are only printed).")
    return parser


def _evaluate_options(options: argparse.Namespace) -> list[str]:
    arguments = ["--data_dir", options.data_dir] if options.data_dir else []
    return arguments + (["--limit", str(options.limit)] if options.limit else [])


def _plan(trials: list[SweepTrial], options: argparse.Namespace) -> None:
    from rich.table import Table

    from prism_lightning.common.console import console
    from prism_lightning.common.counts import format_count
    from prism_lightning.sweeps.planning import device_speed, trial_cost
    from prism_lightning.sweeps.trials import shell_command

    if options.commands:
        for trial in trials:
            for command in trial.commands(_evaluate_options(options)):
                print(shell_command(command))
        return
    speed = device_speed(options.device)
    costs = [trial_cost(trial, speed) for trial in trials]
    table = Table(show_edge=False)
    for column in ("trial", "parameters", "tokens", "steps", "FLOPs", "hours"):
        table.add_column(column, justify="left" if column == "trial" else "right", no_wrap=True)
    for trial, cost in zip(trials, costs, strict=True):
        counts = (format_count(cost.parameters), format_count(cost.tokens), f"{trial.steps:,}")
        table.add_row(trial.name, *counts, f"{cost.flops:.2e}", f"{cost.hours:.3f}")
    table.add_section()
    tokens, flops, hours = (sum(getattr(cost, name) for cost in costs) for name in ("tokens", "flops", "hours"))
    table.add_row(f"{len(trials)} trials", "", format_count(tokens), "", f"{flops:.2e}", f"{hours:.3f}")
    console.print(table)
    console.print(
        f"Hours are training time on {options.device}, one trial after another, without evaluation and start-up."
    )


def _run(trials: list[SweepTrial], options: argparse.Namespace) -> None:
    from prism_lightning.evaluation.suites import load_suites
    from prism_lightning.sweeps.mlflow_parent import parent_run
    from prism_lightning.sweeps.planning import device_speed, trial_cost
    from prism_lightning.sweeps.progress import TrialProgressPrinter
    from prism_lightning.sweeps.running import TrialRunner, make_job, run_locally, submit_jobs

    load_suites(list(trials[0].suites))
    parameters = _slurm_parameters(options.slurm or [])
    uri = trials[0].config["run"]["tracking_uri"]
    if options.slurm and str(uri).startswith("sqlite"):
        raise UserError(
            "--slurm: nodes cannot share one SQLite file: give --run.tracking_uri http://SERVER, or null for a"
            " database in each run directory"
        )
    # The cost of every trial is computed first, because that finds every invalid recipe.
    flops = {trial.name: trial_cost(trial, device_speed(options.device)).flops for trial in trials}
    due = _due_trials(trials, options)
    if not due:
        return
    folder = due[0].run.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the sweep's dir {folder} cannot be created ({error.strerror}): choose another") from error
    if uri:
        parent_run(folder, uri)
    threads = 0 if options.slurm else max(1, (os.cpu_count() or 1) // options.jobs)
    jobs = [make_job(trial, _evaluate_options(options), threads) for trial in due]
    runner = TrialRunner(folder, uri)
    if options.slurm:
        ids = submit_jobs(jobs, runner, "slurm", parameters)
        print(f"submitted {len(ids)} jobs: {' '.join(ids)}; `sweep status` shows their progress")
        return
    with TrialProgressPrinter({trial.name: flops[trial.name] for trial in due}) as progress:
        run_locally(jobs, runner, options.jobs, options.retries, progress.trial_ended)


def _due_trials(trials: list[SweepTrial], options: argparse.Namespace) -> list[SweepTrial]:
    """Return the trials that are neither finished nor submitted, and print which are skipped."""
    from prism_lightning.sweeps.trial_status import trial_status

    commands = {trial.name: list(trial.commands(_evaluate_options(options))) for trial in trials}
    states = {trial.name: trial_status(trial, commands[trial.name]).state for trial in trials}
    skipped = ("finished", "submitted")
    for state in skipped:
        names = [name for name, trial_state in states.items() if trial_state == state]
        if names:
            print(f"{state}, skipped: {', '.join(names)}", flush=True)
    return [trial for trial in trials if states[trial.name] not in skipped]


def _slurm_parameters(pairs: list[str]) -> dict[str, Any]:
    import yaml

    parameters = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--slurm {pair}: write NAME=VALUE")
        try:
            parameters[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--slurm {pair}: {value!r} is not a YAML value: quote it") from error
    return parameters


def _status(trials: list[SweepTrial], options: argparse.Namespace) -> None:
    from rich.table import Table
    from rich.text import Text

    from prism_lightning.common.console import console
    from prism_lightning.sweeps.trial_status import trial_status

    statuses = {trial.name: trial_status(trial) for trial in trials}
    table = Table("trial", "state", "note", show_edge=False)
    for name, status in statuses.items():
        table.add_row(name, status.state, Text(status.note))
    console.print(table)
    states = [status.state for status in statuses.values()]
    console.print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))


def _results(trials: list[SweepTrial], options: argparse.Namespace) -> None:
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
    for content in run_tables(runs, {str(path): load_suite(path) for path in suites}):
        table = Table(*content.columns, title=content.title, title_justify="left", show_edge=False)
        for row in content.rows:
            table.add_row(*map(Text, row))
        console.print(table)
    for line in left_out:
        console.print(f"left out: {line}", markup=False)
    if options.out:
        suite_options = ["--suites", *map(str, suites)] if suites else []
        report(["--runs", str(folder), "--out", str(options.out), *suite_options])
