"""Progress of a sweep that runs on this machine."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from prism_lightning.common.progress import ProgressPrinter
from prism_lightning.sweeps.running import RUN_BY_ANOTHER_PROCESS, TrialJob


class TrialProgressPrinter(ProgressPrinter):
    """Prints a line for each trial that ends, and the estimated time that the remaining trials take.

    Args:
        flops: FLOPs of each trial, by its name.
    """

    def __init__(self, flops: dict[str, float]) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(*columns)
        self.remaining, self.total_flops, self.count = dict(flops), sum(flops.values()), len(flops)
        self.started = time.monotonic()
        self.expected_end: float | None = None  # on the monotonic clock; unknown until a trial has finished
        print(f"{self.count} trials, {self.total_flops:.2e} FLOPs", flush=True)
        self.bar.update(self.task, description="trials", completed=0, total=self.count)

    def trial_ended(self, job: TrialJob, code: int) -> None:
        """Print the outcome of a trial and update the estimate."""
        if code == RUN_BY_ANOTHER_PROCESS:
            print(f"{job.name} is being run by another process, skipped", flush=True)
        elif code:
            print(f"{job.name} failed with exit code {code}, see {job.log}", flush=True)
        else:
            self._trial_finished(job.name)

    def _trial_finished(self, name: str) -> None:
        del self.remaining[name]
        now = time.monotonic()
        finished, remaining_flops = self.count - len(self.remaining), sum(self.remaining.values())
        # The mean of two estimates, by FLOPs and by trials: a small model spends most of its minutes on start-up and
        # evaluation, a large one on training. By FLOPs alone a ladder of 75 minutes was estimated at 700.
        by_flops = remaining_flops / max(self.total_flops - remaining_flops, 1)
        by_trials = len(self.remaining) / finished
        self.expected_end = now + (now - self.started) * (by_flops + by_trials) / 2
        minutes = (now - self.started) / 60
        print(f"[{finished}/{self.count}] {name} finished after {minutes:.1f} min", flush=True)
        self.bar.update(self.task, description=f"trials, {self._time_left()}", completed=finished)

    def _time_left(self) -> str:
        if self.expected_end is None:
            return "time left unknown"
        seconds = max(0.0, self.expected_end - time.monotonic())
        return f"about {seconds / 60:.0f} min left" if seconds >= 120 else f"about {seconds:.0f} s left"

    def line(self) -> str:
        """Return the number of finished trials and the time left."""
        finished = self.count - len(self.remaining)
        return f"trials {finished}/{self.count}  {time.monotonic() - self.started:.0f} s, {self._time_left()}"
