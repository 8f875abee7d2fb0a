"""Scaling law of loss over parameters and tokens, L(N, D) = E + A / N^alpha + B / D^beta.

Fitted as by Hoffmann et al., "Training Compute-Optimal Large Language Models" (2022), section D.2: Huber loss of the
residuals of log L, L-BFGS from a grid of starts, with the three terms as a logarithm of summed exponentials. Intervals
are from bootstrap draws of the runs. n runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

DELTA = 1e-3  # of the Huber loss
STARTS = list(product((0.0, 5.0, 10.0), (0.0, 5.0, 10.0), (-1.0, 0.0, 1.0), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0)))
FINALISTS = 12  # starts that are followed to the end: those with the lowest loss
LARGEST_CONDITION = 30.0  # of the design of log N and log D, standardised to unit spread
NO_FLOOR = 0.01  # nats; E below that is none
FEWEST_VALUES = 3  # of N and of D
FEWEST_PLACES = 9  # (N, D) that differ; a bootstrap draw needs one more than the five parameters


class TooFewRunsError(Exception):
    """The runs cannot carry a scaling law; the message says why."""


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law.

    Attributes:
        parameters: log A, log B, log E, alpha, beta.
        draws_R5: the same of R bootstrap draws.
        error: root mean square of the residuals of log L.
    """

    parameters: np.ndarray
    draws_R5: np.ndarray
    error: float

    def loss(self, size: float, tokens: float) -> float:
        """L(N, D) in nats a token."""
        return float(np.exp(log_loss(self.parameters, np.array([math.log(size)]), np.array([math.log(tokens)]))[0]))

    def draws(self, size: float, tokens: float) -> np.ndarray:
        """L(N, D) of every bootstrap draw."""
        place = np.array([math.log(size)]), np.array([math.log(tokens)])
        return np.array([np.exp(log_loss(parameters, *place)[0]) for parameters in self.draws_R5])

    @property
    def has_floor(self) -> bool:
        """Whether the 95 % interval of E leaves out 0. Far from the runs E is most of the loss: without it the law says
        nothing there (of models of 0.2M to 1M parameters it foretold 0.5 nats at 1.6B).
        """
        return self.facts()["E"][1] > NO_FLOOR

    def facts(self) -> dict[str, tuple[float, float, float]]:
        """E, A, alpha, B and beta, each with its 95 % interval."""
        log_a, log_b, log_e, alpha, beta = np.stack([self.parameters, *np.quantile(self.draws_R5, [0.025, 0.975], 0)]).T
        named = {"E": np.exp(log_e), "A": np.exp(log_a), "alpha": alpha, "B": np.exp(log_b), "beta": beta}
        return {name: (float(one[0]), float(one[1]), float(one[2])) for name, one in named.items()}


def log_loss(parameters: np.ndarray, log_size_n: np.ndarray, log_tokens_n: np.ndarray) -> np.ndarray:
    """Log L [n] of (log A, log B, log E, alpha, beta)."""
    log_a, log_b, log_e, alpha, beta = parameters
    terms = [log_a - alpha * log_size_n, log_b - beta * log_tokens_n, np.full_like(log_size_n, log_e)]
    return logsumexp(terms, axis=0)


def fit(
    sizes_n: np.ndarray,
    tokens_n: np.ndarray,
    losses_n: np.ndarray,
    draws: int = 200,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda *_: None,
) -> ScalingLaw:
    """Fit a law to runs.

    Args:
        sizes_n, tokens_n, losses_n: parameters, training tokens and validation loss of each run.
        draws: bootstrap draws of runs.
        seed: of the draws.
        report: called with draws done and in all.

    Raises:
        TooFewRunsError: too few runs, sizes or token counts, or sizes and tokens that grow together.
    """
    x_n, d_n, y_n = (np.log(np.asarray(values, dtype=float)) for values in (sizes_n, tokens_n, losses_n))
    check(x_n, d_n)
    best = _best(x_n, d_n, y_n, _finalists(x_n, d_n, y_n))
    generator = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while len(found) < draws:
        chosen = generator.integers(0, len(x_n), len(x_n))
        try:
            check(x_n[chosen], d_n[chosen], fewest_places=6)
        except TooFewRunsError:
            continue
        found.append(_best(x_n[chosen], d_n[chosen], y_n[chosen], [best]))
        report(len(found), draws)
    residuals_n = log_loss(best, x_n, d_n) - y_n
    return ScalingLaw(best, np.array(found), float(np.sqrt(np.mean(residuals_n**2))))


def check(log_size_n: np.ndarray, log_tokens_n: np.ndarray, fewest_places: int = FEWEST_PLACES) -> None:
    """Whether runs can tell the terms apart.

    Raises:
        TooFewRunsError: they cannot.
    """
    places = {(round(x, 6), round(d, 6)) for x, d in zip(log_size_n, log_tokens_n, strict=True)}
    sizes, tokens = len({x for x, _ in places}), len({d for _, d in places})
    if sizes < FEWEST_VALUES or tokens < FEWEST_VALUES:
        raise TooFewRunsError(
            f"{sizes} sizes and {tokens} token counts: {FEWEST_VALUES} of each are needed to tell A / N^alpha and"
            " B / D^beta from E"
        )
    if len(places) < fewest_places:
        raise TooFewRunsError(
            f"{len(places)} pairs of a size and a token count, {fewest_places} are needed for five parameters"
        )
    design = np.stack([np.array([x for x, _ in sorted(places)]), np.array([d for _, d in sorted(places)])])
    correlation = abs(np.corrcoef(design)[0, 1])
    condition = (1 + correlation) / max(1 - correlation, 1e-12)
    if condition > LARGEST_CONDITION:
        raise TooFewRunsError(
            f"sizes and tokens grow together (correlation {correlation:.3f} of their logarithms): train some sizes on"
            " other token counts too"
        )


def _finalists(x_n: np.ndarray, d_n: np.ndarray, y_n: np.ndarray) -> list[np.ndarray]:
    starts = [np.array(start) for start in STARTS]
    return sorted(starts, key=lambda start: _objective(start, x_n, d_n, y_n)[0])[:FINALISTS]


def _best(x_n: np.ndarray, d_n: np.ndarray, y_n: np.ndarray, starts: list[np.ndarray]) -> np.ndarray:
    # scipy's least_squares(loss="huber") finds the same parameters, in 1.2 to 4.5 times the processor time.
    bounds = [(-20.0, 40.0), (-20.0, 40.0), (-20.0, 10.0), (1e-3, 3.0), (1e-3, 3.0)]
    options = {"maxiter": 2000, "maxfun": 5000, "ftol": 1e-12, "gtol": 1e-10}
    found = [
        minimize(_objective, start, (x_n, d_n, y_n), "L-BFGS-B", jac=True, bounds=bounds, options=options)
        for start in starts
    ]
    return min(found, key=lambda result: result.fun).x


def _objective(parameters: np.ndarray, x_n: np.ndarray, d_n: np.ndarray, y_n: np.ndarray) -> tuple[float, np.ndarray]:
    """Huber loss of the residuals of log L in units of DELTA, and its gradient."""
    predicted_n = log_loss(parameters, x_n, d_n)
    log_a, log_b, log_e, alpha, beta = parameters
    share_a = np.exp(log_a - alpha * x_n - predicted_n)
    share_b = np.exp(log_b - beta * d_n - predicted_n)
    share_e = np.exp(log_e - predicted_n)
    residual_n = (predicted_n - y_n) / DELTA
    inside = np.abs(residual_n) <= 1
    value = np.where(inside, 0.5 * residual_n**2, np.abs(residual_n) - 0.5).mean()
    slope_n = np.clip(residual_n, -1, 1) / DELTA / len(x_n)
    jacobian = [share_a, share_b, share_e, -x_n * share_a, -d_n * share_b]
    return float(value), np.array([(slope_n * column).sum() for column in jacobian])
