"""Paired statistics: against SciPy, a worked example, and simulations of known differences."""

import itertools

import numpy as np
import pytest
from scipy import stats

from pipeline.paired import compare, holm, mean_t95

QUERIES = 75


def simulated(
    rng: np.random.Generator, episodes: int, gain: float
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies of two learners on episodes of varying difficulty, out of 75 queries each.

    Each query has a probability of 0.5 to 0.9, the same for both but for `gain`, so the accuracies
    are discrete, depend on each other through the episode, and differ by `gain` in expectation.
    """
    difficulty = rng.beta(8, 4, size=episodes) * 0.4 + 0.5
    b = rng.binomial(QUERIES, difficulty) / QUERIES
    a = rng.binomial(QUERIES, difficulty + gain) / QUERIES
    return a, b


def test_the_interval_is_scipys():
    a, b = simulated(np.random.default_rng(0), 200, 0.02)
    found = compare(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    mean, half = mean_t95(a - b)
    assert (mean - half, mean + half) == pytest.approx((found.low, found.high), rel=1e-6)


@pytest.mark.parametrize("gain", [0.0, 0.03])
def test_the_interval_covers_the_true_difference(gain):
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        found = compare(*simulated(rng, 100, gain))
        hits += found.low <= gain <= found.high
    assert 930 <= hits <= 970


def test_equal_learners_are_rarely_told_apart():
    """Of 1,000 pairs without a difference 5 % fall below 0.05; with few queries ties abound."""
    rng = np.random.default_rng(2)
    p_values = []
    for _ in range(1000):
        common = rng.random(100) < 0.6  # these episodes both learners solve alike
        a, b = rng.binomial(5, 0.8, size=(2, 100)) / 5
        p_values.append(compare(np.where(common, a, b), b).p)
    assert 30 <= np.sum(np.array(p_values) < 0.05) <= 70


def test_signed_ranks_with_zeros_by_enumeration():
    """All signs of the non-zero differences are equally likely: the exact p-value by counting."""
    difference = np.array([0, 0, 0.2, 0.2, -0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.2, 0.4])
    ranks = stats.rankdata(np.abs(difference))[difference != 0]
    signs = np.array(list(itertools.product([-1, 1], repeat=len(ranks))))
    sums = signs @ ranks
    seen = np.sign(difference[difference != 0]) @ ranks
    exact = np.mean(np.abs(sums) >= abs(seen) - 1e-9)
    found = compare(difference, np.zeros(12)).p
    assert found == pytest.approx(exact, abs=0.01)  # the normal approximation, at 10 signs


def test_ties_survive_the_arithmetic():
    a, b = np.array([0.6, 0.4, 0.8, 0.2]), np.array([0.4, 0.2, 0.9, 0.2])
    assert len(set(a - b)) == 4  # 0.6 - 0.4 is not 0.4 - 0.2 in floating point
    scaled = compare(10 * a, 10 * b)
    assert compare(a, b).p == pytest.approx(scaled.p)


def test_no_difference_at_all():
    a = np.array([0.2, 0.4, 0.4])
    assert compare(a, a) == (0, 0, 0, 1)


def test_what_cannot_be_paired():
    with pytest.raises(ValueError, match="paired accuracies: found shapes"):
        compare(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="paired accuracies: found shapes"):
        compare(np.zeros(1), np.zeros(1))


def test_holm_by_hand():
    """0.01 * 4, 0.02 * 3, max(0.03 * 2, that before), max(0.04 * 1, that before)."""
    corrected = holm([0.03, 0.01, 0.04, 0.02])
    assert corrected.tolist() == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([]).tolist() == []


def test_the_mean_of_two_seeds_by_hand():
    """t with one degree of freedom is 12.706; the standard error of 1 and 3 is 1."""
    assert mean_t95(np.array([1.0, 3.0])) == pytest.approx((2, 12.706), abs=1e-3)
    assert np.isnan(mean_t95(np.array([1.0]))[1])
