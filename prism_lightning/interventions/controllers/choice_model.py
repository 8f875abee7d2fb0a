"""A conditional logit over the answers of items: p(c) ~ exp(s_c + eta . x_c), convex, with a cross-validated penalty.

Shapes: A answers of all items, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.sparse import csr_matrix, issparse

FOLDS = 5
STRENGTHS = np.logspace(-5, 0, 11)  # the weakest has almost no effect, the strongest leaves almost no factor of 1,000
MAX_WEIGHT = 1e3  # of the model's own scores


def items_of(item_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first answer of each item and the number of its answers, from the ascending items of all answers."""
    starts = np.flatnonzero(np.diff(item_A, prepend=-1))
    return starts, np.diff(np.append(starts, len(item_A)))


@dataclass
class Choices:
    """Answers with scores and features.

    Attributes:
        scores_A: s, the score of each answer without features.
        features_AF: x, dense or sparse.
        item_A: The item of each answer, ascending.
        target_A: 1 for the right answer; several right answers share it.
    """

    scores_A: np.ndarray
    features_AF: np.ndarray | csr_matrix
    item_A: np.ndarray
    target_A: np.ndarray

    def __post_init__(self) -> None:
        self.starts, sizes = items_of(self.item_A)
        self.item_index_A = np.repeat(np.arange(len(sizes)), sizes)
        self.transposed_FA = csr_matrix(self.features_AF.T) if issparse(self.features_AF) else self.features_AF.T

    def of(self, chosen_A: np.ndarray) -> Choices:
        """Return the answers of some items."""
        return Choices(
            self.scores_A[chosen_A], self.features_AF[chosen_A], self.item_A[chosen_A], self.target_A[chosen_A]
        )

    def losses(self, utility_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the cross-entropy of every item in nats, and the probability [A] of every answer."""
        log_p_A = utility_A - np.maximum.reduceat(utility_A, self.starts)[self.item_index_A]
        log_p_A -= np.log(np.add.reduceat(np.exp(log_p_A), self.starts))[self.item_index_A]
        return -np.add.reduceat(self.target_A * log_p_A, self.starts), np.exp(log_p_A)

    def loss(self, eta_F: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the mean cross-entropy of items, and its gradient [F] with respect to eta."""
        losses, p_A = self.losses(self.scores_A + self.features_AF @ eta_F)
        return float(losses.mean()), self.transposed_FA @ ((p_A - self.target_A) / len(losses))


def temperature(scores_A: np.ndarray, item_A: np.ndarray, target_A: np.ndarray) -> float:
    """Return b >= 0 for which p(c) ~ exp(b s_c) has the smallest mean cross-entropy."""
    choices = Choices(scores_A, np.zeros((len(scores_A), 0)), item_A, target_A)
    best_A = np.maximum.reduceat(scores_A, choices.starts)[choices.item_index_A]
    spread = max(float(np.abs(scores_A - best_A).mean()), 1e-9)
    minimum = minimize_scalar(
        lambda b: choices.losses(b / spread * scores_A)[0].mean(), bounds=(0, MAX_WEIGHT), method="bounded"
    )
    return float(minimum.x) / spread


def fit(choices: Choices, kind: str, strength: float, bound: float | None = None) -> np.ndarray:
    """Return eta [F] with the smallest mean cross-entropy + penalty; L-BFGS-B solves this convex problem.

    Args:
        choices: The answers to fit to.
        kind: "l2" for the penalty strength |eta|^2 / 2, "l1" for strength |eta|_1 (as eta = u - v with u, v >= 0).
        strength: Strength of the penalty.
        bound: Largest absolute value of every eta.
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
    """Return kind and strength of the penalty that cross-validation over folds of items selects.

    It is the strongest "l1" penalty whose held-out cross-entropy is within a standard error of the smallest one, since
    few changes can be traced. Where no "l1" penalty is, it is the penalty with the smallest cross-entropy.
    """
    folds = np.random.default_rng(seed).permutation(len(choices.starts)) % FOLDS
    fold_A = folds[choices.item_index_A]
    parts = [(choices.of(fold_A != fold), choices.of(fold_A == fold)) for fold in range(FOLDS)]
    held_out_losses: dict[tuple[str, float], np.ndarray] = {}
    for kind in ("l1", "l2"):
        for strength in STRENGTHS.tolist():
            losses = []
            for training, held_out in parts:
                eta_F = fit(training, kind, strength, bound)
                losses.append(held_out.losses(held_out.scores_A + held_out.features_AF @ eta_F)[0])
            held_out_losses[kind, strength] = np.concatenate(losses)
    best = min(held_out_losses, key=lambda penalty: held_out_losses[penalty].mean())
    for strength in STRENGTHS[::-1].tolist():
        excess = held_out_losses["l1", strength] - held_out_losses[best]
        if excess.mean() <= excess.std(ddof=1) / np.sqrt(len(excess)):
            return "l1", strength
    return best
