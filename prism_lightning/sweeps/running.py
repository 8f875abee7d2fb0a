"""Run a sweep's trials: some at a time on this machine, or as jobs of a cluster."""

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
from prism_lightning.sweeps.parents import adopt
from prism_lightning.sweeps.states import HEARTBEAT, record_path, write_record
from prism_lightning.sweeps.trials import Trial, typed

ELSEWHERE = -1  # exit code of a trial that another process has


@dataclass
class Work:
    """One trial as whoever runs it needs it: plain values that can be sent to a job.

    Attributes:
        commands: verbs with their arguments, in order.
        run, record: its run directory and record; what it prints, its lock and its job are kept beside the latter.
        threads: of its processes; 0 leaves them to torch.
    """

    name: str
    commands: list[list[str]]
    run: Path
    record: Path
    threads: int

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.record.with_suffix(".log")


def work_of(trial: Trial, evaluation: list[str], threads: int) -> Work:
    """What has to be done for a trial."""
    return Work(trial.name, list(trial.commands(evaluation)), trial.run, record_path(trial), threads)


class Runner:
    """Does trials' work in child processes, which it can interrupt.

    Args:
        folder: of the sweep.
        uri: of the MLflow store that all trials share, if they do.
    """

    def __init__(self, folder: Path, uri: str | None) -> None:
        self.folder, self.uri = folder, uri
        self.children: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def __call__(self, work: Work) -> int:
        """Run a trial's commands one after another; the exit code of the first that fails, or 0."""
        if self.stopped:
            return 130
        work.log.parent.mkdir(parents=True, exist_ok=True)
        with locked(work.record.with_suffix(".lock")) as lock:
            return ELSEWHERE if lock is None else self._run(work, lock)

    def _run(self, work: Work, lock: int) -> int:
        started, printed, error = time.time(), _size(work.log), ""
        try:
            with signs_of_life(work):
                code = self._commands(work, lock)
        except Exception as problem:  # one trial's trouble is not the sweep's
            code, error = 1, f"{type(problem).__name__}: {problem}"
        facts: dict[str, Any] = {"seconds": round(time.time() - started, 1), "commands": work.commands}
        if code == 0:
            write_record(work.record, state="finished", **facts)
        elif self.stopped or code in STOP_EXIT_CODES:
            write_record(work.record, state="interrupted", **facts)
        else:
            error = error or last_line(work.log, printed)
            write_record(work.record, state="failed", code=code, error=error, **facts)
        return code

    def _commands(self, work: Work, lock: int) -> int:
        for command in work.commands:
            code = self._command(work, command, lock)
            if command[0] == "fit" and self.uri:
                adopt(self.folder, self.uri, work.run)
            if code:
                return code
        return 0

    def _command(self, work: Work, command: list[str], lock: int) -> int:
        # Inside a job Lightning would ask SLURM for its processes; "interactive" makes it start its own.
        environment = os.environ | {"SLURM_JOB_NAME": "interactive"}
        if work.threads:
            environment |= {"OMP_NUM_THREADS": str(work.threads)}
        with work.log.open("ab") as log:
            log.write(f"$ {typed(command)}\n".encode())
            log.flush()
            # The child holds the lock too: should we be killed and it live on, nobody starts the trial beside it.
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
            except BaseException:  # a job's time is up
                child.send_signal(signal.SIGINT)
                child.wait()
                raise
            finally:
                self.children.discard(child)

    def stop(self) -> None:
        """Interrupt what runs, and start nothing more."""
        self.stopped = True
        for child in list(self.children):
            child.send_signal(signal.SIGINT)


@contextmanager
def locked(path: Path) -> Iterator[int | None]:
    """The descriptor of a locked file; None where another process holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield file.fileno()


@contextmanager
def signs_of_life(work: Work) -> Iterator[None]:
    """Keep a trial's record fresh while it runs."""
    over = threading.Event()
    write_record(work.record, state="running")

    def beat() -> None:
        while not over.wait(HEARTBEAT):
            os.utime(work.record)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def last_line(log: Path, start: int = 0) -> str:
    """What a failed command said last, behind a place in its log, preferring its own error."""
    text = log.read_bytes()[start:].decode(errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["nothing was printed"])[-1][:200]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def run_here(works: list[Work], runner: Runner, jobs: int, retries: int, report: Callable[[Work, int], None]) -> None:
    """Run trials in child processes, `jobs` at a time; what fails is tried again behind the others.

    Raises:
        UserError: naming every trial that failed each time.
        Stopped: after the children have ended.
    """
    tries = {work.name: retries for work in works}
    failed: dict[str, Work] = {}
    with ThreadPoolExecutor(jobs) as pool:
        pending: dict[Future[int], Work] = {pool.submit(runner, work): work for work in works}
        try:
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED, timeout=1.0)
                for future in done:
                    work, code = pending.pop(future), future.result()
                    report(work, code)
                    if code > 0 and tries[work.name]:
                        tries[work.name] -= 1
                        pending[pool.submit(runner, work)] = work
                    elif code > 0:
                        failed[work.name] = work
        except Stopped:
            runner.stop()
            wait(pending)
            raise
    if failed:
        raise UserError([f"{name} failed: {last_line(work.log)} ({work.log})" for name, work in failed.items()])


def submit(works: list[Work], runner: Runner, cluster: str, parameters: dict[str, Any]) -> list[str]:
    """Submit trials as jobs through submitit; returns their ids.

    Args:
        works, runner: see there.
        cluster: "slurm"; tests use "local".
        parameters: of the jobs, as submitit names them: timeout_min, slurm_partition, gpus_per_node.

    Raises:
        UserError: submitit is not installed, there is no such cluster here, or a parameter that it refuses.
    """
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ImportError as error:
        raise UserError("--slurm needs the package submitit: pip install -c constraints.txt submitit") from error
    if "timeout_min" not in parameters:
        raise UserError("--slurm: give timeout_min, a job's minutes: submitit's own is 5")
    ids: list[str] = []
    try:
        executor = submitit.AutoExecutor(folder=runner.folder / "jobs", cluster=cluster)
        executor.update_parameters(**parameters)
        for work in works:
            ids.append(str(executor.submit(runner, work).job_id))
            work.record.parent.mkdir(parents=True, exist_ok=True)
            work.record.with_suffix(".job").write_text(ids[-1])
    except (RuntimeError, NameError, ValueError, TypeError, AssertionError, FailedJobError) as error:
        before = f"{len(ids)} of {len(works)} jobs are submitted; " if ids else ""
        raise UserError(f"--slurm: {before}{' '.join(str(error).split())[:200] or type(error).__name__}") from error
    return ids
