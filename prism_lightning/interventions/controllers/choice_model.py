"""A conditional logit over the answers of items: p(c) ~ exp(s_c + eta . x_c), convex, with a cross-validated penalty.

Shapes: A answers of all items, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.sparse import csr_matrix, issparse

FOLDS = 5
STRENGTHS = np.logspace(-5, 0, 11)  # from next to none to one that leaves next to nothing of 1000 prototypes' factors
LARGEST_WEIGHT = 1e3  # of the model's own scores


def items_of(item_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the answers of each item begin, and how many they are, given the item of each answer, ascending."""
    starts = np.flatnonzero(np.diff(item_A, prepend=-1))
    return starts, np.diff(np.append(starts, len(item_A)))


@dataclass
class Choices:
    """Answers with scores and features.

    Attributes:
        scores_A: s, what is known of each answer without features.
        features_AF: x, dense or sparse.
        item_A: the item of each answer, ascending.
        target_A: 1 for the right answer; several right ones share it.
    """

    scores_A: np.ndarray
    features_AF: np.ndarray | csr_matrix
    item_A: np.ndarray
    target_A: np.ndarray

    def __post_init__(self) -> None:
        self.starts, sizes = items_of(self.item_A)
        self.which_A = np.repeat(np.arange(len(sizes)), sizes)
        self.transposed_FA = csr_matrix(self.features_AF.T) if issparse(self.features_AF) else self.features_AF.T

    def of(self, chosen_A: np.ndarray) -> Choices:
        """The answers of some items."""
        return Choices(
            self.scores_A[chosen_A], self.features_AF[chosen_A], self.item_A[chosen_A], self.target_A[chosen_A]
        )

    def losses(self, utility_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cross-entropy of every item in nats, and p of every answer [A]."""
        log_p_A = utility_A - np.maximum.reduceat(utility_A, self.starts)[self.which_A]
        log_p_A -= np.log(np.add.reduceat(np.exp(log_p_A), self.starts))[self.which_A]
        return -np.add.reduceat(self.target_A * log_p_A, self.starts), np.exp(log_p_A)

    def loss(self, eta_F: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean cross-entropy of items, and its gradient with respect to eta."""
        losses, p_A = self.losses(self.scores_A + self.features_AF @ eta_F)
        return float(losses.mean()), self.transposed_FA @ ((p_A - self.target_A) / len(losses))


def temperature(scores_A: np.ndarray, item_A: np.ndarray, target_A: np.ndarray) -> float:
    """b >= 0 for which p(c) ~ exp(b s_c) has the smallest mean cross-entropy."""
    choices = Choices(scores_A, np.zeros((len(scores_A), 0)), item_A, target_A)
    spread = max(float(np.abs(scores_A - np.maximum.reduceat(scores_A, choices.starts)[choices.which_A]).mean()), 1e-9)
    found = minimize_scalar(
        lambda b: choices.losses(b / spread * scores_A)[0].mean(), bounds=(0, LARGEST_WEIGHT), method="bounded"
    )
    return float(found.x) / spread


def fit(choices: Choices, kind: str, strength: float, bound: float | None = None) -> np.ndarray:
    """eta [F] of the smallest mean cross-entropy + penalty; the problem is convex, L-BFGS-B solves it.

    Args:
        choices: to fit.
        kind, strength: "l2", strength |eta|^2 / 2, or "l1", strength |eta|_1 (as eta = u - v with u, v >= 0).
        bound: on the size of every eta.
    """
    size = choices.features_AF.shape[1]
    if kind == "l2":

        def ridge(eta_F: np.ndarray) -> tuple[float, np.ndarray]:
            loss, gradient = choices.loss(eta_F)
            return loss + strength / 2 * eta_F @ eta_F, gradient + strength * eta_F

        limits = (None if bound is None else -bound, bound)
        return minimize(ridge, np.zeros(size), jac=True, method="L-BFGS-B", bounds=[limits] * size).x

    def lasso(x: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = choices.loss(x[:size] - x[size:])
        return loss + strength * x.sum(), np.concatenate([gradient + strength, strength - gradient])

    x = minimize(lasso, np.zeros(2 * size), jac=True, method="L-BFGS-B", bounds=[(0.0, bound)] * 2 * size).x
    return x[:size] - x[size:]


def cross_validated(choices: Choices, seed: int, bound: float | None = None) -> tuple[str, float]:
    """The penalty with the smallest held-out cross-entropy over folds of items.

    In its place the strongest of kind "l1" that is within a standard error of it: few changes can be traced.
    """
    folds = np.random.default_rng(seed).permutation(len(choices.starts)) % FOLDS
    fold_A = folds[choices.which_A]
    parts = [(choices.of(fold_A != fold), choices.of(fold_A == fold)) for fold in range(FOLDS)]
    found: dict[tuple[str, float], np.ndarray] = {}
    for kind in ("l1", "l2"):
        for strength in STRENGTHS.tolist():
            held_out = []
            for training, other in parts:
                eta_F = fit(training, kind, strength, bound)
                held_out.append(other.losses(other.scores_A + other.features_AF @ eta_F)[0])
            found[kind, strength] = np.concatenate(held_out)
    best = min(found, key=lambda penalty: found[penalty].mean())
    for strength in STRENGTHS[::-1].tolist():
        worse = found["l1", strength] - found[best]
        if worse.mean() <= worse.std(ddof=1) / np.sqrt(len(worse)):
            return "l1", strength
    return best
