"""The fitted law against the one that generated the losses, the gradient, and runs that are refused."""

import math

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from prism_lightning.reporting import scaling_law
from prism_lightning.reporting.scaling import Scaling, extrapolated_gap, scaling_table
from prism_lightning.reporting.scaling_law import UnidentifiableLawError, fit_law, log_loss

TRUE = np.array([math.log(406.4), math.log(410.7), math.log(1.69), 0.34, 0.28])  # Hoffmann et al.'s


def runs(noise=0.0, sizes=(1e7, 4e7, 2e8, 8e8), tokens=(3e8, 2e9, 1e10), seeds=2, drop=0):
    grid = [(n, d) for n in sizes for d in tokens for _ in range(seeds)][drop:]
    n, d = np.array(grid).T
    errors = np.random.default_rng(0).normal(0, noise, len(grid))
    return n, d, np.exp(log_loss(TRUE, np.log(n), np.log(d)) + errors)


def test_a_fit_recovers_the_law():
    law = fit_law(*runs(), draws=5)
    np.testing.assert_allclose(law.parameters[2:], TRUE[2:], rtol=0.02)
    assert law.loss(1.6e9, 5e10) == pytest.approx(np.exp(log_loss(TRUE, np.log([1.6e9]), np.log([5e10])))[0], rel=2e-3)
    assert law.error < 1e-4


def test_the_interval_covers_the_truth_and_widens_with_extrapolation():
    law = fit_law(*runs(noise=0.003), draws=25)
    far, near = law.loss_draws(1.6e9, 5e10), law.loss_draws(2e8, 2e9)
    truth = np.exp(log_loss(TRUE, np.log([1.6e9]), np.log([5e10])))[0]
    assert far.min() < truth < far.max()
    assert np.ptp(far) > np.ptp(near)
    value, low, high = law.estimates()["alpha"]
    assert low < value < high


def test_a_law_without_floor_is_not_extrapolated():
    assert fit_law(*runs(noise=0.003), draws=25).has_floor
    n, d = np.array([(n, d) for n in (1e5, 3e5, 1e6) for d in (4e5, 8e5, 1.6e6) for _ in range(2)]).T
    law = fit_law(n, d, 30 * d**-0.17 + 90 * n**-0.4, draws=5)
    assert not law.has_floor
    table = scaling_table(Scaling({"dense": law}, {}))
    assert (
        table.rows[0][1] == "indistinguishable from 0"
        and table.rows[0][-1] == ""
        and "cannot distinguish E of dense from 0" in table.note
    )
    assert extrapolated_gap(Scaling({"dense": law, "PRISM": law}, {})) is None


def test_the_gradient_is_that_of_the_objective():
    n, d, losses = runs(noise=0.05)
    place = TRUE + np.array([0.3, -0.2, 0.1, 0.05, -0.02])
    arguments = (np.log(n), np.log(d), np.log(losses))
    numeric = approx_fprime(place, lambda p: scaling_law._objective(p, *arguments)[0], 1e-7)
    np.testing.assert_allclose(scaling_law._objective(place, *arguments)[1], numeric, rtol=1e-3, atol=1e-3)


def test_an_outlier_moves_little():
    n, d, losses = runs()
    losses[3] *= 1.5
    law = fit_law(n, d, losses, draws=2)
    assert law.loss(1.6e9, 5e10) == pytest.approx(np.exp(log_loss(TRUE, np.log([1.6e9]), np.log([5e10])))[0], rel=0.02)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sizes": (1e7, 1e8)}, "number of sizes 2, of token counts 3"),
        ({"tokens": (1e9,)}, "number of sizes 4, of token counts 1"),
        (
            {"sizes": (1e7, 1e8, 1e9), "tokens": (1e9, 2e9, 4e9), "seeds": 1, "drop": 1},
            "pairs of a size and a token count 8",
        ),
    ],
)
def test_too_few_runs_are_refused(settings, reason):
    with pytest.raises(UnidentifiableLawError, match=reason):
        fit_law(*runs(**settings))


def test_sizes_and_tokens_that_grow_together_are_refused():
    n = np.geomspace(1e7, 1e10, 10)
    with pytest.raises(UnidentifiableLawError, match="tokens grow with sizes"):
        fit_law(n, 20 * n, 3 * n**-0.05)
