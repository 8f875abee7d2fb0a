"""The conditional logit against its gradient, a peer library, and data whose answer is known."""

import numpy as np
import pytest
from scipy.optimize import check_grad
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from prism_lightning.interventions.choice_model import Choices, cross_validated, fit


def made(items, choices, features, seed=0, effect=None):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(items * choices, features))
    scores = generator.normal(size=items * choices)
    utility = scores if effect is None else scores + x @ effect
    utility = utility + generator.gumbel(size=len(utility))
    item = np.repeat(np.arange(items), choices)
    target = np.zeros(len(x))
    target[np.arange(items) * choices + utility.reshape(items, choices).argmax(1)] = 1
    return Choices(scores, x, item, target)


def test_gradients_are_those_of_the_loss():
    choices = made(20, 3, 4)
    x = np.random.default_rng(1).normal(size=5)
    error = check_grad(
        lambda v: choices.loss(v[0], v[1:])[0],
        lambda v: np.concatenate([[choices.loss(v[0], v[1:])[1]], choices.loss(v[0], v[1:])[2]]),
        x,
    )
    assert error < 1e-6


def test_two_answers_are_a_logistic_regression():
    choices = made(300, 2, 3, effect=np.array([1.0, -1.0, 0.0]))
    weight, eta = fit(choices, "l2", 0.1)
    difference = (
        (np.c_[choices.scores_A, choices.features_AF])[::2] - (np.c_[choices.scores_A, choices.features_AF])[1::2]
    )
    label = choices.target_A[::2]
    # Its penalty counts the first weight as well: scaled up a thousandfold it costs next to nothing.
    difference[:, 0] *= 1e3
    peer = LogisticRegression(C=1 / (0.1 * 300), fit_intercept=False, tol=1e-10, max_iter=10_000).fit(difference, label)
    assert eta == pytest.approx(peer.coef_[0, 1:], abs=2e-3)
    assert weight == pytest.approx(peer.coef_[0, 0] * 1e3, abs=2e-3)


def test_l1_leaves_out_what_does_nothing_and_sparse_features_give_the_same():
    choices = made(400, 4, 30, effect=np.r_[2.0, -2.0, np.zeros(28)])
    sparse = Choices(choices.scores_A, csr_matrix(choices.features_AF), choices.item_A, choices.target_A)
    for found in (fit(choices, "l1", 0.03)[1], fit(sparse, "l1", 0.03)[1]):
        assert found[0] > 0.5 and found[1] < -0.5 and (np.abs(found) > 1e-3).sum() <= 10
    assert fit(choices, "l1", 0.03)[1] == pytest.approx(fit(sparse, "l1", 0.03)[1], abs=1e-3)


def test_cross_validation_shrinks_noise_and_keeps_signal():
    noise = made(120, 4, 40)
    kind, strength = cross_validated(noise, 0)
    assert np.abs(fit(noise, kind, strength)[1]).max() < 0.2
    signal = made(120, 4, 40, effect=np.r_[3.0, np.zeros(39)])
    kind, strength = cross_validated(signal, 0)
    assert fit(signal, kind, strength)[1][0] > 1
