"""Run the trials of a sweep: several at a time on this machine, or as jobs of a cluster."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_lightning.common.errors import UserError
from prism_lightning.common.stops import STOP_EXIT_CODES, Stopped
from prism_lightning.sweeps.mlflow_parent import attach_to_parent
from prism_lightning.sweeps.trial_status import HEARTBEAT_SECONDS, record_path, write_record
from prism_lightning.sweeps.trials import SweepTrial, shell_command

RUN_BY_ANOTHER_PROCESS = -1  # exit code of a trial that another process runs


@dataclass
class TrialJob:
    """One trial as plain values, which can be sent to a cluster.

    Attributes:
        name: Name of the trial.
        commands: Commands to run in this order, each a verb with its arguments.
        run: Run directory.
        record: Path of the trial's record; its log, lock and cluster job id are files with the same stem.
        threads: Threads of each process; 0 means torch's default.
    """

    name: str
    commands: list[list[str]]
    run: Path
    record: Path
    threads: int

    @property
    def log(self) -> Path:
        """File with the output of the trial's commands."""
        return self.record.with_suffix(".log")


def make_job(trial: SweepTrial, evaluate_options: list[str], threads: int) -> TrialJob:
    """Return the job that runs a trial."""
    return TrialJob(trial.name, list(trial.commands(evaluate_options)), trial.run, record_path(trial), threads)


class TrialRunner:
    """Runs trials in child processes, which it can interrupt.

    Args:
        folder: Folder of the sweep.
        uri: Address of the MLflow store that all trials share; None if each trial has its own.
    """

    def __init__(self, folder: Path, uri: str | None) -> None:
        self.folder, self.uri = folder, uri
        self.children: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def __call__(self, job: TrialJob) -> int:
        """Run a trial's commands in order; return the exit code of the first that fails, or 0."""
        if self.stopped:
            return 130
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(job.record.with_suffix(".lock")) as lock:
            return RUN_BY_ANOTHER_PROCESS if lock is None else self._run_and_record(job, lock)

    def _run_and_record(self, job: TrialJob, lock: int) -> int:
        started, log_size, error = time.time(), _file_size(job.log), ""
        try:
            with heartbeat(job):
                code = self._run_commands(job, lock)
        except Exception as problem:  # an error in one trial must not end the sweep
            code, error = 1, f"{type(problem).__name__}: {problem}"
        facts: dict[str, Any] = {"seconds": round(time.time() - started, 1), "commands": job.commands}
        if code == 0:
            write_record(job.record, state="finished", **facts)
        elif self.stopped or code in STOP_EXIT_CODES:
            write_record(job.record, state="interrupted", **facts)
        else:
            error = error or last_error_line(job.log, log_size)
            write_record(job.record, state="failed", code=code, error=error, **facts)
        return code

    def _run_commands(self, job: TrialJob, lock: int) -> int:
        for command in job.commands:
            code = self._run_command(job, command, lock)
            if command[0] == "fit" and self.uri:
                attach_to_parent(self.folder, self.uri, job.run)
            if code:
                return code
        return 0

    def _run_command(self, job: TrialJob, command: list[str], lock: int) -> int:
        # Inside a SLURM job Lightning would expect SLURM to start its processes; "interactive" makes it start its own.
        environment = os.environ | {"SLURM_JOB_NAME": "interactive"}
        if job.threads:
            environment |= {"OMP_NUM_THREADS": str(job.threads)}
        with job.log.open("ab") as log:
            log.write(f"$ {shell_command(command)}\n".encode())
            log.flush()
            # The child inherits the lock: if this process is killed and the child survives, nobody starts the trial
            # a second time.
            child = subprocess.Popen(
                [sys.executable, "-m", "prism_lightning", *command],
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[lock],
            )
            self.children.add(child)
            try:
                if self.stopped:
                    child.send_signal(signal.SIGINT)
                return child.wait()
            except BaseException:  # the time limit of a cluster job
                child.send_signal(signal.SIGINT)
                child.wait()
                raise
            finally:
                self.children.discard(child)

    def stop(self) -> None:
        """Interrupt the running trials and start no others."""
        self.stopped = True
        for child in list(self.children):
            child.send_signal(signal.SIGINT)


@contextmanager
def lock_file(path: Path) -> Iterator[int | None]:
    """Yield the descriptor of a locked file, or None if another process holds the lock."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield file.fileno()


@contextmanager
def heartbeat(job: TrialJob) -> Iterator[None]:
    """Mark a trial as running, and update its record's time stamp until the block ends."""
    ended = threading.Event()
    write_record(job.record, state="running")

    def update_time_stamp() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            os.utime(job.record)

    thread = threading.Thread(target=update_time_stamp, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def last_error_line(log: Path, start: int = 0) -> str:
    """Return the last line that begins with "error: " in a log from byte `start` on, or else the last line."""
    text = log.read_bytes()[start:].decode(errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["nothing was printed"])[-1][:200]


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def run_locally(
    jobs: list[TrialJob], runner: TrialRunner, parallel: int, retries: int, trial_ended: Callable[[TrialJob, int], None]
) -> None:
    """Run trials in child processes; a trial that fails is tried again after the others.

    Args:
        jobs, runner: The trials, and the object that runs them.
        parallel: Number of trials that run at the same time.
        retries: Number of further attempts for a trial that fails.
        trial_ended: Function that is called with each attempt's job and exit code.

    Raises:
        UserError: names every trial whose last attempt failed.
        Stopped: the program was interrupted; the children have ended.
    """
    retries_left = {job.name: retries for job in jobs}
    failed: dict[str, TrialJob] = {}
    with ThreadPoolExecutor(parallel) as pool:
        pending: dict[Future[int], TrialJob] = {pool.submit(runner, job): job for job in jobs}
        try:
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED, timeout=1.0)
                for future in done:
                    job, code = pending.pop(future), future.result()
                    trial_ended(job, code)
                    if code > 0 and retries_left[job.name]:
                        retries_left[job.name] -= 1
                        pending[pool.submit(runner, job)] = job
                    elif code > 0:
                        failed[job.name] = job
        except Stopped:
            runner.stop()
            wait(pending)
            raise
    if failed:
        raise UserError([f"{name} failed: {last_error_line(job.log)} ({job.log})" for name, job in failed.items()])


def submit_jobs(jobs: list[TrialJob], runner: TrialRunner, cluster: str, parameters: dict[str, Any]) -> list[str]:
    """Submit trials to a cluster through submitit and return the ids of the cluster's jobs.

    Args:
        jobs, runner: The trials, and the object that runs them.
        cluster: Name of submitit's executor: "slurm", or "local" in tests.
        parameters: Parameters of submitit's executor, such as timeout_min, slurm_partition and gpus_per_node.

    Raises:
        UserError: submitit is not installed, the cluster is not available, or a parameter is missing or refused.
    """
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ImportError as error:
        raise UserError("--slurm needs the package submitit: pip install -c constraints.txt submitit") from error
    if "timeout_min" not in parameters:
        raise UserError("--slurm: give timeout_min, the time limit of a job in minutes (submitit's default is 5)")
    ids: list[str] = []
    try:
        executor = submitit.AutoExecutor(folder=runner.folder / "jobs", cluster=cluster)
        executor.update_parameters(**parameters)
        for job in jobs:
            ids.append(str(executor.submit(runner, job).job_id))
            job.record.parent.mkdir(parents=True, exist_ok=True)
            job.record.with_suffix(".job").write_text(ids[-1])
    except (RuntimeError, NameError, ValueError, TypeError, AssertionError, FailedJobError) as error:
        submitted = f"{len(ids)} of {len(jobs)} jobs were submitted; " if ids else ""
        raise UserError(f"--slurm: {submitted}{' '.join(str(error).split())[:200] or type(error).__name__}") from error
    return ids
