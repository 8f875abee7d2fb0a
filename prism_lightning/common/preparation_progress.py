"""Progress of a preparation: a spinner on a terminal, elsewhere a line at least every ten seconds, on stderr."""

from __future__ import annotations

import time

from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from prism_lightning.common.progress import ProgressPrinter

LEFT_FROM_SHARE = 0.01  # before this share is done, the time left would be a guess


class PreparationProgress(ProgressPrinter):
    """Counts are in words, since the total is often unknown. Training a tokenizer calls nothing of ours for minutes."""

    def __init__(self) -> None:
        super().__init__(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self.stage("preparing data")

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
