"""Scaling law of loss over parameters and tokens: L(N, D) = E + A / N^alpha + B / D^beta.

The fit follows Hoffmann et al., "Training Compute-Optimal Large Language Models" (2022), section D.2. It minimises the
Huber loss of the residuals of log L by L-BFGS from a grid of starts. The parameters are log A, log B, log E, alpha and
beta, so that log L is the logarithm of a sum of exponentials. Intervals are from bootstrap draws of the runs. In
shapes, n is the number of runs and R that of bootstrap draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

DELTA = 1e-3  # residual at which the Huber loss turns from quadratic to linear
STARTS = list(product((0.0, 5.0, 10.0), (0.0, 5.0, 10.0), (-1.0, 0.0, 1.0), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0)))
FINALISTS = 12  # starts with the lowest loss, from which the fit is run to its end
MAX_CONDITION = 30.0  # largest condition number of the design of log N and log D, standardised to unit spread
MIN_FLOOR = 0.01  # nats per token; a smaller E counts as 0
MIN_VALUES = 3  # of N, and of D
MIN_PAIRS = 9  # different pairs (N, D)
MIN_PAIRS_OF_DRAW = 6  # of a bootstrap draw: one more than the five parameters


class UnidentifiableLawError(Exception):
    """The runs do not determine a scaling law; the message says why."""


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law.

    Attributes:
        parameters: log A, log B, log E, alpha, beta.
        draws_R5: The same parameters of each bootstrap draw.
        error: Root mean square of the residuals of log L.
    """

    parameters: np.ndarray
    draws_R5: np.ndarray
    error: float

    def loss(self, size: float, tokens: float) -> float:
        """Return L(N, D) in nats per token."""
        return float(np.exp(log_loss(self.parameters, np.array([math.log(size)]), np.array([math.log(tokens)]))[0]))

    def loss_draws(self, size: float, tokens: float) -> np.ndarray:
        """Return L(N, D) [R] of each bootstrap draw."""
        place = np.array([math.log(size)]), np.array([math.log(tokens)])
        return np.array([np.exp(log_loss(parameters, *place)[0]) for parameters in self.draws_R5])

    @property
    def has_floor(self) -> bool:
        """Whether the 95 % interval of E excludes 0.

        E is most of the loss of models much larger than the runs, so a law without it must not be extrapolated. One of
        models of 0.2M to 1M parameters predicted 0.5 nats per token at 1.6B.
        """
        return self.estimates()["E"][1] > MIN_FLOOR

    def estimates(self) -> dict[str, tuple[float, float, float]]:
        """Return E, A, alpha, B and beta, each with the ends of its 95 % interval."""
        log_a, log_b, log_e, alpha, beta = np.stack([self.parameters, *np.quantile(self.draws_R5, [0.025, 0.975], 0)]).T
        by_name = {"E": np.exp(log_e), "A": np.exp(log_a), "alpha": alpha, "B": np.exp(log_b), "beta": beta}
        return {name: (float(value), float(low), float(high)) for name, (value, low, high) in by_name.items()}


def log_loss(parameters: np.ndarray, log_size_n: np.ndarray, log_tokens_n: np.ndarray) -> np.ndarray:
    """Return log L [n] of the parameters (log A, log B, log E, alpha, beta)."""
    log_a, log_b, log_e, alpha, beta = parameters
    terms = [log_a - alpha * log_size_n, log_b - beta * log_tokens_n, np.full_like(log_size_n, log_e)]
    return logsumexp(terms, axis=0)


def fit_law(
    sizes_n: np.ndarray,
    tokens_n: np.ndarray,
    losses_n: np.ndarray,
    draws: int = 200,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda *_: None,
) -> ScalingLaw:
    """Fit a law to runs.

    Args:
        sizes_n, tokens_n, losses_n: Parameters, training tokens and validation loss of each run.
        draws: Number of bootstrap draws of runs.
        seed: Seed of the draws.
        report: Function that is called with the number of finished draws and that of all draws.

    Raises:
        UnidentifiableLawError: there are too few runs, sizes or token counts, or tokens grow with sizes.
    """
    x_n, d_n, y_n = (np.log(np.asarray(values, dtype=float)) for values in (sizes_n, tokens_n, losses_n))
    check_identifiable(x_n, d_n)
    best = _minimise(x_n, d_n, y_n, _best_starts(x_n, d_n, y_n))
    generator = np.random.default_rng(seed)
    parameters_of_draws: list[np.ndarray] = []
    while len(parameters_of_draws) < draws:
        indices = generator.integers(0, len(x_n), len(x_n))
        try:
            check_identifiable(x_n[indices], d_n[indices], MIN_PAIRS_OF_DRAW)
        except UnidentifiableLawError:
            continue
        parameters_of_draws.append(_minimise(x_n[indices], d_n[indices], y_n[indices], [best]))
        report(len(parameters_of_draws), draws)
    residuals_n = log_loss(best, x_n, d_n) - y_n
    return ScalingLaw(best, np.array(parameters_of_draws), float(np.sqrt(np.mean(residuals_n**2))))


def check_identifiable(log_size_n: np.ndarray, log_tokens_n: np.ndarray, min_pairs: int = MIN_PAIRS) -> None:
    """Check that runs determine all terms of the law.

    Raises:
        UnidentifiableLawError: they do not.
    """
    pairs = sorted({(round(x, 6), round(d, 6)) for x, d in zip(log_size_n, log_tokens_n, strict=True)})
    sizes, tokens = len({x for x, _ in pairs}), len({d for _, d in pairs})
    if sizes < MIN_VALUES or tokens < MIN_VALUES:
        raise UnidentifiableLawError(
            f"number of sizes {sizes}, of token counts {tokens}: at least {MIN_VALUES} of each are needed to separate"
            " A / N^alpha and B / D^beta from E"
        )
    if len(pairs) < min_pairs:
        raise UnidentifiableLawError(
            f"number of pairs of a size and a token count {len(pairs)}: at least {min_pairs} are needed for five"
            " parameters"
        )
    correlation = abs(np.corrcoef(np.array(pairs).T)[0, 1])
    condition = (1 + correlation) / max(1 - correlation, 1e-12)
    if condition > MAX_CONDITION:
        raise UnidentifiableLawError(
            f"tokens grow with sizes (correlation {correlation:.3f} of their logarithms): train some sizes on other"
            " token counts too"
        )


def _best_starts(x_n: np.ndarray, d_n: np.ndarray, y_n: np.ndarray) -> list[np.ndarray]:
    starts = [np.array(start) for start in STARTS]
    return sorted(starts, key=lambda start: _objective(start, x_n, d_n, y_n)[0])[:FINALISTS]


def _minimise(x_n: np.ndarray, d_n: np.ndarray, y_n: np.ndarray, starts: list[np.ndarray]) -> np.ndarray:
    # scipy's least_squares(loss="huber") finds the same parameters, in 1.2 to 4.5 times the processor time.
    bounds = [(-20.0, 40.0), (-20.0, 40.0), (-20.0, 10.0), (1e-3, 3.0), (1e-3, 3.0)]
    options = {"maxiter": 2000, "maxfun": 5000, "ftol": 1e-12, "gtol": 1e-10}
    fits = [
        minimize(_objective, start, (x_n, d_n, y_n), "L-BFGS-B", jac=True, bounds=bounds, options=options)
        for start in starts
    ]
    return min(fits, key=lambda fit: fit.fun).x


def _objective(parameters: np.ndarray, x_n: np.ndarray, d_n: np.ndarray, y_n: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean Huber loss of the residuals of log L, in units of DELTA, and its gradient [5]."""
    predicted_n = log_loss(parameters, x_n, d_n)
    log_a, log_b, log_e, alpha, beta = parameters
    share_a_n = np.exp(log_a - alpha * x_n - predicted_n)
    share_b_n = np.exp(log_b - beta * d_n - predicted_n)
    share_e_n = np.exp(log_e - predicted_n)
    residual_n = (predicted_n - y_n) / DELTA
    quadratic_n = np.abs(residual_n) <= 1
    value = np.where(quadratic_n, 0.5 * residual_n**2, np.abs(residual_n) - 0.5).mean()
    slope_n = np.clip(residual_n, -1, 1) / DELTA / len(x_n)
    jacobian = [share_a_n, share_b_n, share_e_n, -x_n * share_a_n, -d_n * share_b_n]
    return float(value), np.array([(slope_n * column_n).sum() for column_n in jacobian])
