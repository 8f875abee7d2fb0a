"""Progress of long work: a bar on a terminal, elsewhere a line with the time left at least every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 10.0  # between lines of progress where there is no terminal


class Progressing:
    """Progress of work in phases, on stderr, since stdout is for the answer.

    Use it as a context manager and call it as the work goes on. Without a terminal a thread prints the lines, so that
    they come also while a single step takes long.
    """

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        console = Console(stderr=True)
        self.on_terminal = console.is_terminal
        self.bar = Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # an answer that goes into a file stays there
            disable=not self.on_terminal,
        )
        self.task = self.bar.add_task("", total=None)
        self.phase: str | None = None
        self.done, self.total = 0, 0
        self.phase_began = self.printed = time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> Progressing:
        self.phase_began = self.printed = time.monotonic()
        self.bar.__enter__()
        if not self.on_terminal:
            threading.Thread(target=self._print_lines, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self.bar.__exit__(kind, error, trace)

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Say how far the work has come: `done` of `total` steps of a phase, in any unit."""
        if phase != self.phase:
            self.phase, self.phase_began = phase, time.monotonic()
            self.bar.reset(self.task, description=phase, total=total)
        self.done, self.total = done, total
        self.bar.update(self.task, completed=done, total=total)

    def _print_lines(self) -> None:
        while not self._over.wait(max(0.05, self.printed + LINE_SECONDS - time.monotonic())):
            if self.phase and time.monotonic() - self.printed >= LINE_SECONDS:
                self.printed = time.monotonic()
                print(self.line(), file=sys.stderr, flush=True)
            elif not self.phase:
                self.printed = time.monotonic()

    def line(self) -> str:
        """The line of now: phase, steps done and in all, and the time left at the pace so far."""
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
