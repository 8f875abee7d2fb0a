"""Where each trial of a sweep stands, from its run directory and a small record that whoever runs it keeps fresh."""

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
from prism_lightning.sweeps.trials import Trial

State = Literal["waiting", "submitted", "running", "failed", "finished"]
HEARTBEAT = 15.0  # seconds between signs of life of a running trial
RECORD = {
    "state": one_of("running", "interrupted", "failed", "finished"),
    "seconds": optional(number(0)),
    "error": optional(text()),
}
SILENCE = 90.0  # seconds without one after which it counts as interrupted


@dataclass
class Standing:
    """Of one trial.

    Attributes:
        state: "waiting" also where it was interrupted.
        note: why it failed, what is left to do, or how long it took.
    """

    state: State
    note: str


def record_path(trial: Trial) -> Path:
    """The record of a trial, beside its run directory; .log, .lock and .job stand beside it."""
    return trial.run.parent / "trials" / f"{trial.name}.json"


def write_record(path: Path, **facts: Any) -> None:
    """Replace a trial's record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


def _record(path: Path) -> dict[str, Any]:
    """A trial's record; empty where there is none or it is damaged: the trial is then run again."""
    record = read_json(path)
    return {} if record is None or problem_in(record, RECORD) else record


def standing(trial: Trial, commands: list[list[str]] | None = None) -> Standing:
    """Where a trial stands; with `commands`, finished only if these were run and not, say, with another limit."""
    path = record_path(trial)
    record = _record(path)
    job = path.with_suffix(".job")
    if job.is_file() and (not path.is_file() or path.stat().st_mtime < job.stat().st_mtime):
        return Standing("submitted", f"job {job.read_text()}; to run it anyway remove {job}")
    state = record.get("state")
    if state == "running" and time.time() - os.path.getmtime(path) < SILENCE:
        return Standing("running", str(path.with_suffix(".log")))
    if state == "failed":
        return Standing("failed", f"{record.get('error', '')} ({path.with_suffix('.log')})")
    left = unfinished(trial)
    if state != "finished" or left:
        return Standing("waiting", f"{left[0]} is next" if left and trial.run.is_dir() else "")
    if commands is not None and record.get("commands") != commands:
        return Standing("waiting", "it was run with other settings")
    return Standing("finished", f"{record.get('seconds') or 0:,.0f} s")


def unfinished(trial: Trial) -> list[str]:
    """What is left to do: "fit", then the tasks of the suites that have no result."""
    run = RunDirectory(RunSettings(dir=str(trial.run)))
    try:
        step = (run.last_results() or {}).get("step", -1)
    except UserError:  # `fit` says what is wrong with the file
        step = -1
    left = [] if step >= trial.steps and run.paths.model.is_dir() else ["fit"]
    for suite in trial.suites:
        left += [task for task in load_suite(suite) if read_result(run.paths.evaluation, task) is None]
    return left
