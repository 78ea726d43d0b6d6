"""Calibration: closed forms, SciPy, scikit-learn and torchmetrics as oracles."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from sklearn.metrics import roc_auc_score
from torchmetrics.functional.classification import multiclass_calibration_error

from pipeline.calibration import (
    auroc,
    conformal_p,
    coverage_accuracy,
    ece,
    fit_temperature,
    reliability,
    wilson_interval,
)


def drawn(n: int, sharpness: float, classes: int = 5, seed: int = 0):
    """Labels drawn from softmax(logits / sharpness): that is their true temperature."""
    rng = np.random.default_rng(seed)
    z = sharpness * rng.normal(0, 2, size=(n, classes))
    noise = rng.gumbel(size=z.shape)  # argmax of z/T + Gumbel noise is a draw from the softmax
    return torch.from_numpy(z), torch.from_numpy((z / sharpness + noise).argmax(1))


def loss(z: torch.Tensor, y: torch.Tensor, t: float) -> float:
    return float(torch.nn.functional.cross_entropy(z / t, y))


@pytest.mark.parametrize("sharpness", [1e-3, 0.2, 1.0, 40.0])
def test_the_true_temperature_is_found(sharpness):
    z, y = drawn(20_000, sharpness)
    assert fit_temperature(z, y) == pytest.approx(sharpness, rel=0.03)


@pytest.mark.parametrize("n", [24, 60, 500])
def test_the_likelihood_is_scipys_best(n):
    z, y = drawn(n, 3.0, seed=n)
    best = optimize.minimize_scalar(
        lambda log_t: loss(z, y, math.exp(log_t)), bounds=(-5, 7), method="bounded",
        options={"xatol": 1e-10},
    )  # fmt: skip
    assert fit_temperature(z, y) == pytest.approx(math.exp(best.x), rel=1e-5)


def test_a_temperature_in_closed_form():
    """Two classes at distance 1, right three times of four: sigmoid(1 / T) = 3/4."""
    z = torch.tensor([[1.0, 0.0]]).repeat(400, 1)
    y = torch.tensor([0, 0, 0, 1]).repeat(100)
    assert fit_temperature(z, y) == pytest.approx(1 / math.log(3))
    assert fit_temperature(z.float(), y) == fit_temperature(z + 7.0, y)


def test_the_temperature_scales_with_the_logits():
    z, y = drawn(300, 1.0)
    assert fit_temperature(1000 * z, y) == pytest.approx(1000 * fit_temperature(z, y))


@pytest.mark.parametrize("n", [5, 25, 400])
def test_all_right_is_no_certainty(n):
    """Mean confidence is the rule of succession's, sigmoid(1 / T) = (n + 1) / (n + 2)."""
    z = torch.tensor([[0.0, 1.0]]).repeat(n, 1)
    t = fit_temperature(z, torch.ones(n, dtype=torch.long))
    assert t == pytest.approx(1 / math.log(n + 1))


def test_no_temperature_runs_away():
    z = torch.tensor([[3.0, 0.0, 0.0]]).repeat(9, 1)
    spread = math.sqrt(2.0)  # of 3, 0, 0 from their mean 1: sqrt((4 + 1 + 1) / 3)
    assert fit_temperature(z, torch.full((9,), 2)) == pytest.approx(100 * spread)
    tied = torch.tensor([[1.0, 1.0, 0.0]]).repeat(9, 1)
    assert 0 < fit_temperature(tied, torch.zeros(9, dtype=torch.long)) < 0.001
    assert fit_temperature(torch.ones(9, 3), torch.zeros(9, dtype=torch.long)) == 1
    mixed = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 1e-9]])
    assert math.isfinite(fit_temperature(mixed, torch.tensor([0, 0, 1])))


def test_a_temperature_needs_finite_logits():
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(torch.tensor([[0.0, -math.inf]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="shapes"):
        fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))


def test_bins_by_hand():
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.5, 0.5]])
    found = reliability(p, np.array([0, 1, 1, 0]), bins=5)
    assert found.counts.tolist() == [0, 0, 2, 1, 1]  # 0.6 and 0.8 end their bins
    assert found.confidences[2:] == pytest.approx([0.55, 0.8, 0.9])
    assert found.accuracies[2:] == pytest.approx([1, 0, 1])
    assert np.isnan(found.accuracies[:2]).all()
    assert np.isnan(found.confidences[:2]).all()
    assert found.ece() == pytest.approx((2 * 0.45 + 0.8 + 0.1) / 4)


@pytest.mark.parametrize("bins", [10, 15])
def test_the_error_is_that_of_torchmetrics(bins):
    z, y = drawn(3000, 0.4, seed=3)  # overconfident as logits
    p = torch.softmax(z / 0.1, dim=1)
    expected = multiclass_calibration_error(p, y, num_classes=5, n_bins=bins, norm="l1")
    assert ece(p, y, bins) == pytest.approx(float(expected), abs=1e-6)
    assert ece(p, y, bins) > 0.1


def test_the_fitted_temperature_calibrates():
    fit, held = drawn(4000, 0.3, seed=4), drawn(4000, 0.3, seed=5)
    t = fit_temperature(*fit)
    before, after = (ece(torch.softmax(held[0] / s, dim=1), held[1]) for s in (0.1, t))
    assert after < 0.03 < before


@pytest.mark.parametrize("correct", [0, 1, 12, 24, 25])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilsons_interval_is_scipys(correct, level):
    z = float(stats.norm.ppf((1 + level) / 2))
    expected = stats.binomtest(correct, 25).proportion_ci(level, method="wilson")
    assert wilson_interval(correct, 25, z) == pytest.approx((expected.low, expected.high))


def test_wilsons_interval_at_its_ends():
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(5, 5)[1] == 1
    with pytest.raises(ValueError, match="6 correct of 5"):
        wilson_interval(6, 5)


@pytest.mark.parametrize("digits", [1, 12])  # with and without ties
def test_the_area_is_that_of_scikit_learn(digits):
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(0.7, 1, 80).round(digits), rng.normal(0, 1, 50).round(digits)
    truth = np.repeat([1, 0], [80, 50])
    expected = roc_auc_score(truth, np.concatenate([positive, negative]))
    assert auroc(positive, torch.from_numpy(negative)) == pytest.approx(expected)
    assert auroc(negative, positive) == pytest.approx(1 - expected)


def test_the_area_by_hand():
    assert auroc([2, 3], [1, 2]) == pytest.approx(3.5 / 4)
    with pytest.raises(ValueError, match="0 positives"):
        auroc([], [1])


def test_conformal_p_values_by_hand():
    found = conformal_p(torch.tensor([[0.0, 1.0], [2.5, 9.0]]), [1, 2, 3])
    assert found == pytest.approx(np.array([[1 / 4, 2 / 4], [3 / 4, 1]]))
    assert conformal_p([5.0], []).tolist() == [1]


def test_conformal_p_values_are_valid():
    """Of exchangeable cases at most alpha fall at or below alpha: here exactly k / 20."""
    rng = np.random.default_rng(1)
    p = np.array([conformal_p(s[:1], s[1:])[0] for s in rng.normal(size=(20_000, 20))])
    for alpha in (0.05, 0.1, 0.5):
        assert (p <= alpha + 1e-9).mean() == pytest.approx(alpha, abs=0.011)


def test_coverage_by_hand():
    coverage, accuracy = coverage_accuracy([0.5, 0.9, 0.7, 0.5], [False, True, True, True])
    assert coverage == pytest.approx([1 / 4, 2 / 4, 1])  # the two at 0.5 come together
    assert accuracy == pytest.approx([1, 1, 3 / 4])
    assert [len(x) for x in coverage_accuracy([], [])] == [0, 0]
