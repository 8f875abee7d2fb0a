"""Progress of measurements that follow one another."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # title, steps done, steps in all
ShareProgress = Callable[[float], None]  # share of one measurement that is done


class MeasurementProgress:
    """Progress of several measurements in turn, counted in prompts.

    Args:
        progress: Receives the title, the prompts done and the prompts in all.
        title: What is being measured.
        prompts: Number of prompts of each measurement.
        measurements: Largest number of measurements.
    """

    def __init__(self, progress: Progress, title: str, prompts: int, measurements: int) -> None:
        self.progress, self.title, self.prompts, self.total = progress, title, prompts, prompts * measurements
        self.begun, self.done = -prompts, -1

    def next(self) -> ShareProgress:
        """Begin the next measurement and return what it reports its share to."""
        self.begun += self.prompts
        begun = self.begun
        return lambda share: self._show(min(begun + int(share * self.prompts), self.total))

    def finish(self) -> None:
        """Show the end, also where fewer measurements were needed than planned."""
        self._show(self.total)

    def _show(self, done: int) -> None:
        if done > self.done:
            self.done = done
            self.progress(self.title, done, self.total)
