"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from prism_lightning.explaining import console

LINE_SECONDS = 10  # between lines of progress where there is no terminal


class Progressing:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=None)
        self.what, self.began, self.printed = "", 0.0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show how far the work has come."""
        now = time.monotonic()
        if what != self.what:
            self.what, self.began, self.printed = what, now, now
            self.bar.reset(self.task, description=what, total=total)
        self.bar.update(self.task, completed=done, total=total)
        last = done == total
        if not console.is_terminal and (last or now - self.printed > LINE_SECONDS):
            self.printed = now
            print(f"{what} {done:,}/{total:,}  {now - self.began:.0f} s", flush=True)
