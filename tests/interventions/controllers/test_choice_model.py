"""The conditional logit against its gradient, a peer library, and data whose answer is known."""

import numpy as np
import pytest
from scipy.optimize import check_grad
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from prism_lightning.interventions.controllers.choice_model import Choices, cross_validated, fit, temperature


def random_choices(items, choices, features, seed=0, effect=None):
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
    choices = random_choices(20, 3, 4)
    eta = np.random.default_rng(1).normal(size=4)
    assert check_grad(lambda v: choices.loss(v)[0], lambda v: choices.loss(v)[1], eta) < 1e-6


def test_two_answers_are_a_logistic_regression():
    choices = random_choices(300, 2, 3, effect=np.array([1.0, -1.0, 0.0]))
    choices.scores_A[:] = 0
    eta = fit(choices, "l2", 0.1)
    difference, label = choices.features_AF[::2] - choices.features_AF[1::2], choices.target_A[::2]
    peer = LogisticRegression(C=1 / (0.1 * 300), fit_intercept=False, tol=1e-10, max_iter=10_000).fit(difference, label)
    assert eta == pytest.approx(peer.coef_[0], abs=2e-3)


def test_the_temperature_is_the_scale_that_was_planted():
    choices = random_choices(20_000, 4, 1)
    for scale in (1.0, 50.0):  # a per-character score is as good as one of the whole answer
        fitted = temperature(choices.scores_A / scale, choices.item_A, choices.target_A)
        assert fitted == pytest.approx(scale, rel=0.05)
    noise = np.random.default_rng(0).permutation(choices.scores_A)
    assert temperature(noise, choices.item_A, choices.target_A) < 0.05


def test_l1_leaves_out_what_does_nothing_and_sparse_features_give_the_same():
    choices = random_choices(400, 4, 30, effect=np.r_[2.0, -2.0, np.zeros(28)])
    sparse = Choices(choices.scores_A, csr_matrix(choices.features_AF), choices.item_A, choices.target_A)
    for fitted in (fit(choices, "l1", 0.08), fit(sparse, "l1", 0.08)):
        assert fitted[0] > 0.3 and fitted[1] < -0.3 and (np.abs(fitted) > 1e-3).sum() <= 6
    assert fit(choices, "l1", 0.08) == pytest.approx(fit(sparse, "l1", 0.08), abs=1e-3)
    assert np.abs(fit(choices, "l1", 0.01, bound=0.5)).max() == pytest.approx(0.5)


def test_cross_validation_shrinks_noise_and_keeps_signal():
    noise = random_choices(120, 4, 40)
    assert np.abs(fit(noise, *cross_validated(noise, 0))).max() < 0.4
    signal = random_choices(120, 4, 40, effect=np.r_[3.0, np.zeros(39)])
    assert fit(signal, *cross_validated(signal, 0))[0] > 1
