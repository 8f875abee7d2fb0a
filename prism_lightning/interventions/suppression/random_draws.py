"""Random prototypes in place of the selected ones: how they are drawn, and when enough of them were drawn.

Shapes: K prototypes.
"""

from __future__ import annotations

import math

import numpy as np

from prism_lightning.common.statistics import mean_interval
from prism_lightning.interventions.suppression.measurements import Measurement
from prism_lightning.interventions.suppression.settings import Goal

NEIGHBOURS = 20  # prototypes of nearest usage that a random one is drawn from
DRAWS_PER_LOOK = 4  # draws between two looks at the interval of their mean


def planned_looks(draws: int) -> int:
    """Return how often the interval of the mean is looked at when at most so many draws are planned."""
    return max(1, math.ceil(draws / DRAWS_PER_LOOK))


def enough_draws(draws: list[Measurement], planned_draws: int, goal: Goal) -> bool:
    """Return whether, at a look, the interval of the mean rate reduction is within a tenth of the goal either way."""
    if len(draws) % DRAWS_PER_LOOK:
        return False
    low, high = mean_interval([draw.rate_reduction for draw in draws], planned_looks(planned_draws))
    return (high - low) / 2 <= goal.min_rate_reduction / 10


def usage_matched_prototypes(prototypes: list[int], usage_K: np.ndarray, generator: np.random.Generator) -> list[int]:
    """Return a random other prototype of about equal usage for each given one; fewer where the others run out."""
    order = np.argsort(usage_K, kind="stable")
    rank_K = np.argsort(order)
    free_K, matches = np.ones(len(order), dtype=bool), []
    free_K[prototypes] = False
    for prototype in prototypes:
        others = order[free_K[order]]
        if not len(others):
            break
        distances = np.abs(rank_K[others] - rank_K[prototype])
        matches.append(int(generator.choice(others[np.argsort(distances, kind="stable")[:NEIGHBOURS]])))
        free_K[matches[-1]] = False
    return matches
