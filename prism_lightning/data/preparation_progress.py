"""Progress of a preparation: a spinner on a terminal, elsewhere a line at least every ten seconds, on stderr."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

LINE_SECONDS = 9.5
LEFT_FROM_SHARE = 0.01  # before this share is done, the time left would be a guess


class PreparationProgress:
    """Lines come from a thread of their own: training a tokenizer calls nothing of ours for minutes."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=None)
        self.printer = threading.Thread(target=self._print_lines, daemon=True)
        self.finished = threading.Event()
        self.stage("preparing data")

    def __enter__(self) -> PreparationProgress:
        self.bar.start()
        if self.bar.disable:
            self.printer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finished.set()
        self.bar.stop()

    def stage(self, what: str) -> None:
        """Begin another part of the work."""
        self.what, self.counts, self.share, self.began = what, "", 0.0, time.monotonic()
        self.bar.update(self.task, description=what)

    def __call__(self, counts: str, share: float = 0.0) -> None:
        """Say how far this part is: in words, and as a share of the whole where that is known."""
        self.counts, self.share = counts, share
        self.bar.update(self.task, description=f"{self.what}: {counts}")

    def line(self) -> str:
        """What is being done, how much of it is done, and the seconds since its beginning and to its end."""
        seconds = time.monotonic() - self.began
        left = f", {seconds * (1 / self.share - 1):.0f} s left" if LEFT_FROM_SHARE < self.share <= 1 else ""
        return f"{self.what}{': ' * bool(self.counts)}{self.counts}, {seconds:.0f} s{left}"

    def _print_lines(self) -> None:
        while not self.finished.wait(LINE_SECONDS):
            print(self.line(), file=sys.stderr, flush=True)
