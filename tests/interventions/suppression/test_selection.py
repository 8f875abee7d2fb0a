"""The search over levels, when enough random draws were made, and intervals of rates."""

import math
from dataclasses import replace

import numpy as np
import pytest

from prism_lightning.common.statistics import Z95, mean_interval
from prism_lightning.interventions.suppression.continuation_stats import ContinuationStats
from prism_lightning.interventions.suppression.measurements import Measurement
from prism_lightning.interventions.suppression.progress import MeasurementProgress
from prism_lightning.interventions.suppression.random_draws import (
    DRAWS_PER_LOOK,
    enough_draws,
    planned_looks,
)
from prism_lightning.interventions.suppression.selection import choose, search_levels
from prism_lightning.interventions.suppression.settings import Goal

LEVELS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]


def measurement(level, reduction, increase=0.0):
    stats = ContinuationStats([False], {}, 0.0, 0.0, 1.0)
    interval = (reduction - 0.1, reduction + 0.1)
    return Measurement(str(level), level, stats, reduction, interval, increase, (increase, increase), 1.0)


def searched(reductions, increases=None, goal=None):
    """The path over levels, and how far the stage came."""
    increases, reports = increases or [0.0] * len(LEVELS), []

    def measure(level, share):
        share(1.0)
        return measurement(level, reductions[LEVELS.index(level)], increases[LEVELS.index(level)])

    path = search_levels(
        LEVELS,
        lambda level: increases[LEVELS.index(level)],
        measure,
        goal or Goal(0.8, 0.02),
        lambda count: MeasurementProgress(lambda *report: reports.append(report), "choosing", 5, count),
    )
    return path, reports


@pytest.mark.parametrize("place", range(len(LEVELS)))
def test_bisection_finds_the_first_that_surely_meets_the_goal(place):
    reductions = [0.1] * place + [0.95] * (len(LEVELS) - place)
    path, reports = searched(reductions)
    assert [m.prototypes for m in path] == sorted(m.prototypes for m in path)
    assert choose(path, Goal(0.8, 0.02)).prototypes == LEVELS[place]
    assert len(path) <= 5 < len(LEVELS)
    done = [report[1] for report in reports]
    assert done == sorted(done) and reports[-1][1] == reports[-1][2] and max(done) <= reports[-1][2]


def test_of_what_costs_no_more_the_fewest_that_fall_most_are_taken_where_the_goal_is_missed():
    reductions = [0.1, 0.2, 0.3, 0.5, 0.5, 0.5, 0.9, 0.95, 0.97, 1.0]
    increases = [0.001 * level for level in LEVELS[:6]] + [0.021, 0.03, 0.04, 0.05]
    path, _ = searched(reductions, increases)
    assert max(m.prototypes for m in path) == 8  # 12 cost too much
    assert choose(path, Goal(0.8, 0.02)).prototypes == 4


def test_where_all_cost_too_much_the_first_is_measurement():
    path, _ = searched([0.9] * 10, [0.5] * 10)
    assert [m.prototypes for m in path] == [1]


def test_intervals_of_a_mean_keep_their_meaning_where_drawing_stops_early():
    """Of 2,000 simulated runs of up to 20 draws that stop at a narrow interval, 95 % or more cover the true mean."""
    generator, covered, draw_counts, goal = np.random.default_rng(0), 0, [], Goal(0.8, 0.02)
    plain = measurement(1, 0.0)
    for _ in range(2000):
        reductions = generator.normal(0.03, 0.08, 20).tolist()
        draws = []
        while len(draws) < 20 and not (draws and enough_draws(draws, 20, goal)):
            draws.append(replace(plain, rate_reduction=reductions[len(draws)]))
        low, high = mean_interval([draw.rate_reduction for draw in draws], planned_looks(20))
        covered += low <= 0.03 <= high
        draw_counts.append(len(draws))
    assert covered >= 0.95 * 2000
    assert (
        min(draw_counts) < 20
        and len(set(draw_counts)) > 2
        and all(number % DRAWS_PER_LOOK == 0 for number in draw_counts)
    )


def test_an_interval_of_a_mean_is_students_shared_out_among_planned_looks():
    assert planned_looks(20) == 5 and planned_looks(2) == 1 and planned_looks(0) == 1
    low, high = mean_interval([0.0, 0.02])  # t of one degree of freedom, 12.7, times .01
    assert (low + high) / 2 == pytest.approx(0.01) and (high - low) / 2 == pytest.approx(0.12706, rel=1e-3)
    wide_low, wide_high = mean_interval([0.0, 0.02], planned_looks(20))
    assert wide_low < low and wide_high > high
    assert mean_interval([0.1]) == (-math.inf, math.inf)


@pytest.mark.parametrize("count", [1, 40, 400])
def test_the_interval_of_a_rate_is_wilsons(count):
    """Against the formula (Wilson 1927), with the quantile that all normal intervals here use."""
    for successes in {0, 1, count // 3, count - 1, count}:
        stats = ContinuationStats([True] * successes + [False] * (count - successes), {}, 0.0, 0.0, 1.0)
        rate, scale = successes / count, 1 + Z95**2 / count
        centre = (rate + Z95**2 / (2 * count)) / scale
        half = Z95 / scale * math.sqrt(rate * (1 - rate) / count + Z95**2 / (4 * count**2))
        expected = (max(0.0, centre - half), min(1.0, centre + half))
        assert stats.interval == pytest.approx(expected, abs=1e-12)
        assert stats.interval[0] <= rate <= stats.interval[1]
