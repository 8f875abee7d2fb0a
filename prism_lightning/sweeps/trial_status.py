"""Status of each trial of a sweep, read from its run directory and its record.

The record is a small JSON file. The process that runs the trial updates it regularly while the trial runs.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prism_lightning.common.errors import UserError
from prism_lightning.common.files import read_json, write_json
from prism_lightning.common.manifests import number, one_of, optional, problem_in, text
from prism_lightning.evaluation.results import read_result
from prism_lightning.evaluation.suites import load_suite
from prism_lightning.run.directory import RunDirectory, RunSettings
from prism_lightning.sweeps.trials import SweepTrial

State = Literal["waiting", "submitted", "running", "failed", "finished"]
RECORD = {
    "state": one_of("running", "interrupted", "failed", "finished"),
    "seconds": optional(number(0)),
    "error": optional(text()),
}
HEARTBEAT_SECONDS = 15.0  # between updates of a running trial's record
TIMEOUT_SECONDS = 90.0  # without an update after which a running trial counts as interrupted


@dataclass
class TrialStatus:
    """Status of one trial.

    Attributes:
        state: Name of the state; an interrupted trial is "waiting".
        note: Reason of a failure, next step, or duration.
    """

    state: State
    note: str


def record_path(trial: SweepTrial) -> Path:
    """Return the path of a trial's record; its .log, .lock and .job files have the same stem."""
    return trial.run.parent / "trials" / f"{trial.name}.json"


def write_record(path: Path, **facts: Any) -> None:
    """Replace a trial's record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


def _read_record(path: Path) -> dict[str, Any]:
    """Return a trial's record; an absent or damaged one is empty, so that the trial is run again."""
    record = read_json(path)
    return {} if record is None or problem_in(record, RECORD) else record


def trial_status(trial: SweepTrial, commands: list[list[str]] | None = None) -> TrialStatus:
    """Return a trial's status.

    Args:
        trial: The trial.
        commands: If given, the trial counts as finished only if exactly these commands were run. Another --limit, for
            example, is another command.
    """
    path = record_path(trial)
    record = _read_record(path)
    job = path.with_suffix(".job")
    if job.is_file() and (not path.is_file() or path.stat().st_mtime < job.stat().st_mtime):
        return TrialStatus("submitted", f"job {job.read_text()}; remove {job} to run the trial again")
    state = record.get("state")
    if state == "running" and time.time() - os.path.getmtime(path) < TIMEOUT_SECONDS:
        return TrialStatus("running", str(path.with_suffix(".log")))
    if state == "failed":
        return TrialStatus("failed", f"{record.get('error', '')} ({path.with_suffix('.log')})")
    steps = unfinished_steps(trial)
    if state != "finished" or steps:
        return TrialStatus("waiting", f"next step: {steps[0]}" if steps and trial.run.is_dir() else "")
    if commands is not None and record.get("commands") != commands:
        return TrialStatus("waiting", "finished with other settings")
    return TrialStatus("finished", f"{record.get('seconds') or 0:,.0f} s")


def unfinished_steps(trial: SweepTrial) -> list[str]:
    """Return the steps that remain: "fit", then every task of the suites that has no result."""
    run = RunDirectory(RunSettings(dir=str(trial.run)))
    try:
        last_step = (run.last_results() or {}).get("step", -1)
    except UserError:  # `fit` reports what is wrong with the file
        last_step = -1
    steps = [] if last_step >= trial.steps and run.paths.model.is_dir() else ["fit"]
    for suite in trial.suites:
        steps += [task for task in load_suite(suite) if read_result(run.paths.evaluation, task) is None]
    return steps
