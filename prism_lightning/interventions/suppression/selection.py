"""Selection of the strength of a suppression: the number of prototypes, or the size of a bias, that meets the goal."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import TypeVar

from prism_lightning.interventions.suppression.measurements import Measurement
from prism_lightning.interventions.suppression.progress import MeasurementProgress, ShareProgress
from prism_lightning.interventions.suppression.settings import Goal

PROTOTYPE_COUNTS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
BIASES = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 100.0]  # subtracted from the logits of the behaviour's words
Level = TypeVar("Level", int, float)


def choose(path: list[Measurement], goal: Goal) -> Measurement:
    """Return the first measurement that surely meets the goal.

    Without one, return the largest rate reduction among those whose perplexity increase is within the goal.
    """
    sure = next((measurement for measurement in path if measurement.surely_meets(goal)), None)
    affordable = [m for m in path if m.perplexity_increase <= goal.max_perplexity_increase] or path[:1]
    return sure or max(affordable, key=lambda measurement: measurement.rate_reduction)


def counts_up_to(candidates: int) -> list[int]:
    """Return the numbers of prototypes to try, ascending up to all candidates."""
    return [*takewhile(lambda count: count < candidates, PROTOTYPE_COUNTS), candidates]


def search_levels(
    levels: list[Level],
    perplexity_increase: Callable[[Level], float],
    measure: Callable[[Level, ShareProgress], Measurement],
    goal: Goal,
    start_progress: Callable[[int], MeasurementProgress],
) -> list[Measurement]:
    """Measure the highest level whose perplexity increase is within the goal, then lower ones by bisection.

    The perplexity increase needs no continuations, so it is computed from the lowest level up, until one exceeds the
    goal. Bisection then looks for the lowest level that surely meets the goal. Where the highest level does not, it
    looks for the lowest one with the same rate reduction. Bisection assumes that the reduction grows with the level;
    the chosen level itself is always measured.

    Args:
        levels: Ascending levels.
        perplexity_increase: Increase of perplexity on texts without the behaviour at a level.
        measure: Measures a level completely.
        goal: Bounds of the rate reduction and the perplexity increase.
        start_progress: Begins the progress of at most so many measurements.

    Returns:
        The measurements, in the order of levels.
    """
    within = list(takewhile(lambda level: perplexity_increase(level) <= goal.max_perplexity_increase, levels))
    within = within or levels[:1]
    insufficient, sufficient = -1, len(within) - 1
    progress = start_progress(1 + sufficient.bit_length())
    highest = measure(within[sufficient], progress.next())
    measurements = {sufficient: highest}
    while sufficient - insufficient > 1:
        middle = (insufficient + sufficient) // 2
        measurement = measurements[middle] = measure(within[middle], progress.next())
        if highest.surely_meets(goal):
            enough = measurement.surely_meets(goal)
        else:
            enough = measurement.rate_reduction >= highest.rate_reduction
        insufficient, sufficient = (insufficient, middle) if enough else (middle, sufficient)
    progress.finish()
    return [measurements[number] for number in sorted(measurements)]
