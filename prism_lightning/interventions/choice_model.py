"""A conditional logit over the answers of items: p(c) ~ exp(b s_c + eta . x_c), convex, with a cross-validated penalty.

Shapes: A answers of all items, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, issparse

FOLDS = 5
PENALTIES = [(kind, float(strength)) for kind in ("l2", "l1") for strength in np.logspace(-4, 0, 9)]


@dataclass
class Choices:
    """Answers with scores and features.

    Attributes:
        scores_A: s, log-likelihoods of the model.
        features_AF: x, dense or sparse.
        item_A: the item of each answer, ascending.
        target_A: 1 for the right answer; several right ones share it.
    """

    scores_A: np.ndarray
    features_AF: np.ndarray | csr_matrix
    item_A: np.ndarray
    target_A: np.ndarray

    def __post_init__(self) -> None:
        self.starts = np.flatnonzero(np.diff(self.item_A, prepend=-1))
        self.which_A = np.cumsum(np.isin(np.arange(len(self.item_A)), self.starts)) - 1
        self.transposed_FA = self.features_AF.T.tocsr() if issparse(self.features_AF) else self.features_AF.T

    def of(self, chosen_A: np.ndarray) -> Choices:
        """The answers of some items."""
        return Choices(
            self.scores_A[chosen_A], self.features_AF[chosen_A], self.item_A[chosen_A], self.target_A[chosen_A]
        )

    def loss(self, weight: float, eta_F: np.ndarray) -> tuple[float, float, np.ndarray]:
        """Mean cross-entropy of items in nats, and its gradient with respect to b and eta."""
        utility_A = weight * self.scores_A + self.features_AF @ eta_F
        log_p_A = utility_A - np.maximum.reduceat(utility_A, self.starts)[self.which_A]
        log_p_A -= np.log(np.add.reduceat(np.exp(log_p_A), self.starts))[self.which_A]
        residual_A = (np.exp(log_p_A) - self.target_A) / len(self.starts)
        loss = -float((self.target_A * log_p_A).sum()) / len(self.starts)
        return loss, float(residual_A @ self.scores_A), self.transposed_FA @ residual_A


def fit(choices: Choices, kind: str, strength: float) -> tuple[float, np.ndarray]:
    """b >= 0 and eta [F] of the smallest mean cross-entropy + penalty; the problem is convex, L-BFGS-B solves it.

    Args:
        choices: to fit.
        kind, strength: "l2", strength |eta|^2 / 2, or "l1", strength |eta|_1 (as eta = u - v with u, v >= 0).
    """
    size = choices.features_AF.shape[1]
    if kind == "l2":

        def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
            loss, slope, gradient = choices.loss(x[0], x[1:])
            return loss + strength / 2 * x[1:] @ x[1:], np.concatenate([[slope], gradient + strength * x[1:]])

        bounds = [(0.0, None)] + [(None, None)] * size
        x = minimize(objective, np.array([1.0] + [0.0] * size), jac=True, method="L-BFGS-B", bounds=bounds).x
        return float(x[0]), x[1:]

    def split(x: np.ndarray) -> tuple[float, np.ndarray]:
        up, down = x[1 : 1 + size], x[1 + size :]
        loss, slope, gradient = choices.loss(x[0], up - down)
        return loss + strength * x[1:].sum(), np.concatenate([[slope], gradient + strength, strength - gradient])

    start = np.array([1.0] + [0.0] * 2 * size)
    x = minimize(split, start, jac=True, method="L-BFGS-B", bounds=[(0.0, None)] * len(start)).x
    return float(x[0]), x[1 : 1 + size] - x[1 + size :]


def cross_validated(choices: Choices, seed: int) -> tuple[str, float]:
    """The penalty with the smallest held-out cross-entropy over folds of items."""
    items = np.random.default_rng(seed).permutation(len(choices.starts)) % FOLDS
    fold_A = items[choices.which_A]
    losses = []
    for kind, strength in PENALTIES:
        held_out = 0.0
        for fold in range(FOLDS):
            weight, eta_F = fit(choices.of(fold_A != fold), kind, strength)
            held_out += choices.of(fold_A == fold).loss(weight, eta_F)[0]
        losses.append(held_out)
    return PENALTIES[int(np.argmin(losses))]
