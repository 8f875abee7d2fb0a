"""LDS, its intervals and its ceiling, against cases whose answer is known."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.attribution.cost import break_even, fit_line, growth, predicted_seconds
from benchmarks.attribution.lds import bootstrap, ceiling, predictions, rank_correlation, ratio
from benchmarks.attribution.planted import ranks_of
from benchmarks.attribution.quality import top_overlap
from benchmarks.attribution.report import times_as_long
from benchmarks.attribution.retraining import halves


@pytest.fixture(scope="module")
def world():
    """Halves, true effects of sequences on queries, and the losses they make, with the noise of two training seeds."""
    generator = np.random.default_rng(0)
    included = halves(60, 100)
    effects = generator.normal(size=(20, 60))
    clean = predictions(included, effects)
    noise = clean.std(1).mean() * generator.normal(size=(2, *clean.shape))
    return included, effects, clean, clean + noise


def test_rank_correlation_is_scipys():
    generator = np.random.default_rng(1)
    left, right = generator.normal(size=(2, 5, 30)).round(1)  # with ties
    expected = [spearmanr(*pair).statistic for pair in zip(left, right, strict=True)]
    np.testing.assert_allclose(rank_correlation(left, right), expected)
    assert rank_correlation(np.ones((1, 4)), right[:1, :4]) == 0


def test_true_effects_score_one_and_opposite_ones_minus_one(world):
    included, effects, clean, _ = world
    assert bootstrap([(predictions(included, effects), clean)], repeats=20).value == pytest.approx(1)
    assert bootstrap([(predictions(included, -effects), clean)], repeats=20).value == pytest.approx(-1)


def test_interval_holds_the_value_and_shrinks_with_more_halves(world):
    _, _, clean, noisy = world
    whole = bootstrap([(clean, noisy[0])], repeats=200)
    part = bootstrap([(clean[:, :25], noisy[0][:, :25])], repeats=200)
    assert whole.low < whole.value < whole.high
    assert part.high - part.low > 1.5 * (whole.high - whole.low)


def test_draws_are_ranked_like_what_was_drawn(world):
    """Against ranking every draw itself, ties and a constant side among the values."""
    _, _, clean, noisy = world
    left, right = clean.round(), noisy[0].round(1)
    left[3] = 0.0
    queries, count = left.shape
    generator, expected = np.random.default_rng(0), []
    for _ in range(20):
        drawn = np.ix_(generator.integers(queries, size=queries), generator.integers(count, size=count))
        expected.append(rank_correlation(left[drawn], right[drawn]).mean())
    np.testing.assert_allclose(bootstrap([(left, right)], repeats=20).repeats_R, expected)


def test_differences_are_paired(world):
    _, _, clean, noisy = world
    one, same = (bootstrap([(clean, noisy[0])], repeats=50) for _ in range(2))
    equal = ratio(one, same)
    assert equal.low == equal.value == equal.high == 1


def test_ceiling_is_what_true_effects_reach(world):
    included, effects, _, noisy = world
    found = ceiling(noisy)
    reached = rank_correlation(predictions(included, effects), noisy.mean(0)).mean()
    assert found["agreement"] == pytest.approx(0.5, abs=0.1)  # as much noise as effect
    assert found["ceiling"] == pytest.approx(reached, abs=0.03)


def test_half_of_the_sequences_is_in_every_half():
    included = halves(50, 8)
    assert (included.sum(1) == 25).all()
    assert len({row.tobytes() for row in included}) == 8
    np.testing.assert_array_equal(included, halves(50, 8))


def test_ranks_and_overlap():
    scores = np.array([[0.1, 0.9, 0.5, 0.3], [4.0, 3.0, 2.0, 1.0]])
    assert ranks_of(scores, [[3, 2], [3]]) == [2, 4]
    assert top_overlap(scores, scores, 2) == 1
    assert top_overlap(scores, -scores, 2) == 0


def test_ratio_of_times_spans_all_pairs():
    assert times_as_long([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == "2.00 (0.67 to 9.00)"
    assert times_as_long([70.0], [0.007, 0.005]) == "11,667 (10,000 to 14,000)"


def test_lines_growth_and_break_even():
    answers = {f"token {q}": [2 + 0.5 * q] * 3 for q in (1, 16, 64)}
    assert fit_line(answers, "token") == pytest.approx((2, 0.5))
    assert growth([100, 200, 400], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert break_even((10, 0, 1), (2, 0, 3)) == "more than 4"  # 10 + q = 2 + 3 q
    assert break_even((2, 0, 3), (10, 0, 1)) == "fewer than 4"
    assert break_even((10, 0, 1), (20, 0, 3)) == "any number of"
    assert break_even((10, 0, 3), (2, 0, 1)) == "no"
    assert predicted_seconds((10.0, 1.0), 600) == 610 and predicted_seconds((10.0, 1.0), 600, 512) == 620
