"""Progress of long work: a bar on a terminal, elsewhere a line with the time left at least every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 9.5  # between lines where there is no terminal: at least one in every ten seconds
ESTIMATE_SHARE = 0.01  # An estimate of the time left would be a guess before this share is done.


class ProgressPrinter:
    """Base of the two kinds of progress: shows a bar on a terminal, and prints `line()` regularly elsewhere.

    A thread prints the lines, so that they continue while a single step takes long. Both go to stderr, since stdout is
    for results. A subclass defines the line and updates `bar`.

    Args:
        columns: of the bar.
    """

    def __init__(self, *columns: ProgressColumn) -> None:
        console = Console(stderr=True)
        self.bar = Progress(
            *columns,
            console=console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # Results that go into a file must not be redirected.
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=None)
        self.printer = threading.Thread(target=self._print_lines, daemon=True)
        self._finished = threading.Event()

    def __enter__(self) -> Self:
        self.bar.start()
        if self.bar.disable:
            self.printer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()
        self.bar.stop()

    def line(self) -> str:
        """Return the current line; an empty one is not printed."""
        raise NotImplementedError

    def _print_lines(self) -> None:
        while not self._finished.wait(LINE_SECONDS):
            if line := self.line():
                print(line, file=sys.stderr, flush=True)


class PhaseProgress(ProgressPrinter):
    """Progress of work in phases of counted steps: a context manager that the work calls after each step."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        super().__init__(*columns, TimeElapsedColumn(), TimeRemainingColumn())
        self.phase: str | None = None
        self.done, self.total, self.phase_start = 0, 0, time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of a phase are finished, in any unit."""
        if phase != self.phase:
            self.phase, self.phase_start = phase, time.monotonic()
            self.bar.reset(self.task, description=phase, total=total)
        self.done, self.total = done, total
        self.bar.update(self.task, completed=done, total=total)

    def line(self) -> str:
        """Return the phase, its steps done and in all, and the time left at the pace so far; "" before any phase."""
        if self.phase is None:
            return ""
        seconds = time.monotonic() - self.phase_start
        seconds_left = (
            f"{seconds * (self.total - self.done) / self.done:.0f} s left" if self.done else "time left unknown"
        )
        return f"{self.phase} {self.done:,}/{self.total:,}  {seconds:.0f} s, {seconds_left}"


class TokenCountStreamer:
    """Streamer for `model.generate(streamer=...)` that reports how many tokens have been generated.

    Args:
        progress: where they are reported.
        total: maximum number of generated tokens.
    """

    def __init__(self, progress: PhaseProgress, total: int) -> None:
        self.progress, self.total, self.generated = progress, total, -1  # the first call has the prompt

    def put(self, _: object) -> None:
        """Count one call: the first one has the prompt, each further one a generated token."""
        self.generated += 1
        self.progress("generating", self.generated, self.total)

    def end(self) -> None:
        """Do nothing; `generate` calls this after the last token."""


class PreparationProgress(ProgressPrinter):
    """Progress of preparing data: a spinner, and counts in words, since the total is often unknown.

    Training a tokenizer takes minutes in one call; only the elapsed time changes meanwhile.
    """

    def __init__(self) -> None:
        super().__init__(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self.start_stage("preparing data")

    def start_stage(self, stage: str) -> None:
        """Begin a stage of the preparation."""
        self.stage, self.counts, self.share, self.stage_start = stage, "", 0.0, time.monotonic()
        self.bar.update(self.task, description=stage)

    def __call__(self, counts: str, share: float = 0.0) -> None:
        """Report the stage's counts in words, and the share of it that is done where that is known."""
        self.counts, self.share = counts, share
        self.bar.update(self.task, description=f"{self.stage}: {counts}")

    def line(self) -> str:
        """Return the stage, its counts, the seconds since it began and, where known, the seconds left."""
        seconds = time.monotonic() - self.stage_start
        known = ESTIMATE_SHARE < self.share <= 1
        seconds_left = f", {seconds * (1 / self.share - 1):.0f} s left" if known else ""
        return f"{self.stage}{': ' * bool(self.counts)}{self.counts}, {seconds:.0f} s{seconds_left}"
