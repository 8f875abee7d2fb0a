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
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 9.5  # between lines where there is no terminal: at least one in every ten seconds


class ProgressPrinter:
    """A bar on a terminal; elsewhere a thread prints `line()` now and then, also while a single step takes long.

    Both on stderr, since stdout is for the answer. A subclass says what the line is, and updates `bar`.

    Args:
        columns: of the bar.
    """

    def __init__(self, *columns: ProgressColumn) -> None:
        console = Console(stderr=True)
        self.bar = Progress(
            *columns,
            console=console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # an answer that goes into a file stays there
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=None)
        self.printer = threading.Thread(target=self._print_lines, daemon=True)
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self.bar.start()
        if self.bar.disable:
            self.printer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self.bar.stop()

    def line(self) -> str:
        """The line of now; nothing is printed where it is empty."""
        raise NotImplementedError

    def _print_lines(self) -> None:
        while not self._over.wait(LINE_SECONDS):
            if line := self.line():
                print(line, file=sys.stderr, flush=True)


class Progressing(ProgressPrinter):
    """Progress of work in phases of counted steps: a context manager that is called as the work goes on."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        super().__init__(*columns, TimeElapsedColumn(), TimeRemainingColumn())
        self.phase: str | None = None
        self.done, self.total, self.phase_began = 0, 0, time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Say how far the work has come: `done` of `total` steps of a phase, in any unit."""
        if phase != self.phase:
            self.phase, self.phase_began = phase, time.monotonic()
            self.bar.reset(self.task, description=phase, total=total)
        self.done, self.total = done, total
        self.bar.update(self.task, completed=done, total=total)

    def line(self) -> str:
        """Phase, steps done and in all, and the time left at the pace so far; empty before the first phase."""
        if self.phase is None:
            return ""
        seconds = time.monotonic() - self.phase_began
        left = f"{seconds * (self.total - self.done) / self.done:.0f} s left" if self.done else "time left unknown"
        return f"{self.phase} {self.done:,}/{self.total:,}  {seconds:.0f} s, {left}"


class TokenProgress:
    """Counts the tokens that `model.generate(streamer=...)` adds.

    Args:
        progress: where they are shown.
        total: tokens at most.
    """

    def __init__(self, progress: Progressing, total: int) -> None:
        self.progress, self.total, self.added = progress, total, -1  # the prompt comes first

    def put(self, _: object) -> None:
        """Take the prompt, then one token after the other."""
        self.added += 1
        self.progress("generating", self.added, self.total)

    def end(self) -> None:
        """Nothing is left to do."""
