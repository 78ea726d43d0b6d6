"""Closed forms and hand-derived numbers."""

import numpy as np
import pytest
import torch

from pipeline.functional import (
    accuracy,
    count_ways,
    mean_ci95,
    prototypes,
    query_loss,
    squared_distances,
)
from pipeline.inner import SGD, descend

A, B = torch.tensor([1.0, 2, 3]).double(), torch.tensor([4.0, 5, 6]).double()


def half_square(a):
    """0.5 (a . w)^2, whose gradient is a (a . w)."""
    return lambda p: 0.5 * (a @ p["w"]) ** 2


@pytest.mark.parametrize(
    ("inner", "outer", "lr", "steps", "first_order", "phi", "expected"),
    [
        # one step, phi = (I - lr a a^T) w, outer gradient (I - lr a a^T) b (b . phi)
        (A, half_square(B), 0.5, 1, False, [-9.5, -20, -29.5], [3780, 8505, 13230]),
        # first order: b (b . phi)
        (B, half_square(A), 0.5, 1, True, [-104, -129.5, -154], [-825, -1650, -2475]),
        # three steps: (I - lr a a^T)^3 b
        (A, lambda p: B @ p["w"], 1.0, 3, False, [-3609, -7219, -10828], [-5020, -10043, -15066]),
    ],
    ids=["second order", "first order", "three steps"],
)
def test_meta_gradient_by_hand(inner, outer, lr, steps, first_order, phi, expected):
    w = torch.tensor([2.0, 3, 5], dtype=torch.float64, requires_grad=True)
    adapted = descend(half_square(inner), {"w": w}, SGD(), lr, steps, first_order)
    assert adapted["w"].tolist() == phi
    (gradient,) = torch.autograd.grad(outer(adapted), w)
    assert gradient.tolist() == expected


def test_first_order_builds_no_second_derivative():
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    adapted = descend(half_square(A), {"w": w}, SGD(), 0.1, 2, first_order=True)
    (jacobian,) = torch.autograd.grad(adapted["w"].sum(), w)
    assert jacobian.tolist() == [1, 1, 1]  # d phi / d theta is the identity


def test_prototypes_of_unbalanced_classes():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(7, 4)), np.array([2, 0, 2, 1, 2, 0, 2])
    expected = np.stack([z[y == c].mean(0) for c in range(3)])
    means = prototypes(torch.from_numpy(z), torch.from_numpy(y), 3)
    np.testing.assert_allclose(means, expected, rtol=1e-12)


def test_squared_distances():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(2, 3))
    expected = ((a[:, None] - b[None]) ** 2).sum(-1)
    np.testing.assert_allclose(
        squared_distances(torch.from_numpy(a), torch.from_numpy(b)), expected, rtol=1e-10
    )


def test_distances_do_not_cancel_under_autocast():
    generator = torch.Generator().manual_seed(0)
    a, b = (100 + torch.randn(6, 64, generator=generator) for _ in "ab")
    exact = torch.cdist(a.double(), b.double()).square()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = squared_distances(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0.01, atol=0.5)
    assert squared_distances(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_count_ways_names_the_missing_class():
    assert count_ways(torch.tensor([2, 0, 1, 1])) == 3
    with pytest.raises(ValueError, match=r"no image of class 1 of 0\.\.2"):
        count_ways(torch.tensor([0, 2]))


def test_accuracy():
    logits = torch.tensor([[1.0, 2], [3, 0], [0, 1], [5, 6]])
    assert accuracy(logits, torch.tensor([1, 1, 1, 1])).item() == 0.75


def test_interval():
    values = np.random.default_rng(2).uniform(size=50)
    mean, ci95 = mean_ci95(torch.from_numpy(values))
    assert mean == pytest.approx(values.mean())
    assert ci95 == pytest.approx(1.96 * values.std(ddof=1) / np.sqrt(50))
    assert np.isnan(mean_ci95(torch.tensor([0.5])).ci95)


def test_losses_by_hand():
    logits = torch.tensor([[[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]]], dtype=torch.float64)  # (1, 2, 3)
    y = torch.tensor([[0, 1]])
    z, t = logits.numpy(), np.eye(3)[y.numpy()]
    sigmoid = 1 / (1 + np.exp(-z))
    expected = {
        "cross_entropy": np.log(np.exp(z).sum(-1)) - (z * t).sum(-1),
        "binary_cross_entropy": -(t * np.log(sigmoid) + (1 - t) * np.log(1 - sigmoid)).mean(-1),
        "mse": ((z - t) ** 2).mean(-1),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(query_loss(name, logits, y), value, rtol=1e-12)
        np.testing.assert_allclose(query_loss(name, logits[0], y[0]), value[0], rtol=1e-12)
    targets = torch.tensor([[[1.0], [3.0]]])
    assert query_loss("mse", torch.tensor([[[1.5], [1.0]]]), targets).tolist() == [[0.25, 4.0]]
