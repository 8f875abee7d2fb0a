"""Confidence intervals: of rates, of values with a standard error, and of means over few draws. All are 95 %."""

from __future__ import annotations

import math

Z95 = 1.959964  # half width of a 95 % interval in standard errors


def normal_interval(value: float, error: float) -> tuple[float, float]:
    """Return the interval of a value with a standard error, by the normal approximation."""
    return value - Z95 * error, value + Z95 * error


def rate_interval(successes: int, count: int) -> tuple[float, float]:
    """Return Wilson's interval of a rate."""
    from scipy.stats import binomtest, norm  # takes a second, which reading results need not spend

    level = float(1 - 2 * norm.sf(Z95))  # 95 %, rounded as in the normal intervals
    interval = binomtest(successes, count).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: list[float], looks: int = 1) -> tuple[float, float]:
    """Return Student's interval of a mean; it stays valid when drawing stops early, at one of the planned looks.

    The 5 % are shared out among all looks (Bonferroni). All of them then cover the mean together in 95 % of cases, and
    the look that drawing stopped at is one of them. One value has no interval.
    """
    import numpy as np
    from scipy import stats

    if len(values) < 2:
        return -math.inf, math.inf
    quantile = stats.t.isf(0.025 / looks, len(values) - 1)
    half = quantile * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)
