"""Solvers and the learners around them against scikit-learn, optimality and finite differences."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.svm import LinearSVC
from torch import nn
from torch.autograd import gradcheck

from pipeline.errors import UserError
from pipeline.learners import embedding
from pipeline.learners.metaoptnet import MetaOptNet
from pipeline.learners.protonet import ProtoNet
from pipeline.learners.r2d2 import R2D2
from pipeline.solvers import crammer_singer, indicators, irls, logistic_regression, ridge

Y = torch.tensor([0, 2, 1, 0, 1, 2, 2, 2])  # unbalanced


def task(n_way=5, shots=(1, 5, 3), d=16, scale=1.0, seed=0):
    """Support embeddings of unequal shots, in float64, off centre."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.full((shots[c % len(shots)],), c) for c in range(n_way)])
    z = torch.randn(len(y), d, generator=generator) + torch.randn(1, d, generator=generator)
    return scale * z.double(), y


def one_vs_rest(y, n_way):
    return np.stack([y.numpy() == c for c in range(n_way)]).astype(float)


# Ridge regression


@pytest.mark.parametrize("d", [4, 40], ids=["tall", "wide"])
@pytest.mark.parametrize("l2", [0.1, 5.0])
def test_ridge_is_optimal_in_both_forms(d, l2):
    z, y = task(d=d)
    targets = torch.from_numpy(one_vs_rest(y, 5))
    reference = Ridge(alpha=l2, fit_intercept=False, solver="svd").fit(z, targets.T).coef_
    for dual in (None, True, False):
        weight = ridge(z, targets, l2, dual).requires_grad_()
        np.testing.assert_allclose(weight.detach(), reference, atol=1e-9)
        objective = (z @ weight.T - targets.T).square().sum() + l2 * weight.square().sum()
        (slope,) = torch.autograd.grad(objective, weight)
        assert slope.abs().max() < 1e-9


# Logistic regression by IRLS


def test_irls_follows_the_papers_iterations():
    """As they are written, in NumPy: weighted ridge regression to a working response."""
    z, y = task()
    x, l2 = z.numpy(), 0.7
    for steps in (1, 2, 4):
        found = irls(z, y, 5, l2, steps)
        for c, target in enumerate(one_vs_rest(y, 5)):
            w = np.zeros(x.shape[1])
            for _ in range(steps):
                mu = 1 / (1 + np.exp(-x @ w))
                s = mu * (1 - mu)
                response = x @ w + (target - mu) / s
                system = x.T @ (s[:, None] * x) + l2 * np.eye(x.shape[1])
                w = np.linalg.solve(system, x.T @ (s * response))
            np.testing.assert_allclose(found[c], w, atol=1e-10)


def test_irls_arrives_at_logistic_regressions_of_one_class_against_the_rest():
    z, y = task()
    found = irls(z, y, 5, 0.5, 12)
    for c, target in enumerate(one_vs_rest(y, 5)):
        reference = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-10).fit(z, target)
        np.testing.assert_allclose(found[c], reference.coef_[0], atol=1e-4)


# Logistic regression to convergence


@pytest.mark.parametrize(
    ("n_way", "d", "l2", "scale"),
    [(5, 16, 1.0, 1.0), (5, 64, 0.1, 0.5), (3, 2, 0.01, 2.0), (2, 16, 0.5, 1.0), (2, 3, 5.0, 2.0)],
)
def test_logistic_regression_is_that_of_scikit_learn(n_way, d, l2, scale):
    z, y = task(n_way, d=d, scale=scale)
    with torch.inference_mode():
        weight, bias = logistic_regression(z, y, n_way, l2)
    # newton-cg: its lbfgs stops some 1e-3 away from the optimum in the bias
    reference = LogisticRegression(C=1 / l2, solver="newton-cg", tol=1e-12, max_iter=10_000)
    reference.fit(z, y)
    if n_way == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    np.testing.assert_allclose(weight, reference.coef_, atol=1e-4)
    np.testing.assert_allclose(bias, reference.intercept_, atol=1e-4)


@pytest.mark.parametrize(("l2", "scale"), [(1e-4, 1.0), (1e-4, 30.0), (1.0, 30.0), (1e3, 1.0)])
def test_logistic_regression_is_optimal_where_plain_newton_steps_diverge(l2, scale):
    z, y = task(scale=scale)
    weight, bias = (x.requires_grad_() for x in logistic_regression(z, y, 5, l2))
    objective = F.cross_entropy(z @ weight.T + bias, y, reduction="sum")
    objective = objective + l2 / 2 * weight.square().sum()
    for slope in torch.autograd.grad(objective, (weight, bias)):
        assert slope.abs().max() < 1e-6


# The multi-class SVM


def svm_objective(weight, z, y, c):
    logits = z @ weight.T
    wrong = 1 - F.one_hot(y, len(weight)).to(z.dtype)
    hinge = (logits + wrong).amax(1) - logits.gather(1, y[:, None]).squeeze(1)
    return weight.square().sum() / 2 + c * hinge.sum()


@pytest.mark.parametrize(
    ("c", "d", "scale"), [(0.1, 16, 1.0), (0.1, 64, 3.0), (100.0, 16, 1.0), (1.0, 3, 1.0)]
)
def test_svm_is_that_of_liblinear(c, d, scale):
    z, y = task(d=d, scale=scale)
    weight = crammer_singer(z, y, 5, c)
    reference = LinearSVC(
        multi_class="crammer_singer", C=c, fit_intercept=False, tol=1e-8, max_iter=10**7
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        reference.fit(z, y)
    np.testing.assert_allclose(weight, reference.coef_, atol=1e-5)
    other = svm_objective(torch.from_numpy(reference.coef_), z, y, c)
    assert svm_objective(weight, z, y, c) <= other * (1 + 1e-6)


@pytest.mark.parametrize(("c", "r"), [(0.1, 1.0), (0.1, 5.0), (3.0, 0.5), (3.0, 2.0)])
def test_svm_of_one_image_a_class_by_hand(c, r):
    """Orthogonal images of length r: by symmetry each has p on every wrong class.

    Its margin c n p r^2 reaches 1 at p = 1 / (c n r^2), if that leaves any p for its own class.
    """
    n = 4
    p = min(1 / (n - 1), 1 / (c * n * r**2))
    expected = c * r * p * (n * torch.eye(n).double() - 1)
    weight = crammer_singer(r * torch.eye(n).double(), torch.arange(n), n, c)
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-9)


def test_svm_of_equal_images_of_several_classes():
    """A singular kernel, weights that several supports could give, and an image at 0."""
    z, y = task(shots=(3, 4))
    z[1], z[3], z[-1] = z[0], z[0], 0
    z.requires_grad_()
    weight = crammer_singer(z, y, 5, 1.0)
    (slope,) = torch.autograd.grad(weight.square().sum(), z)
    assert slope.isfinite().all()
    weight = weight.detach()
    best = svm_objective(weight, z, y, 1.0)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-1, 1e-3, 1e-5):  # convex: no better point is near
        near = size * torch.randn(50, *weight.shape, generator=generator).double()
        assert all(svm_objective(weight + step, z, y, 1.0) >= best - 1e-9 for step in near)


# All of them


SOLVERS = {
    "ridge, primal": lambda z, y, s: ridge(z, indicators(y, 3, z.dtype), s, False),
    "ridge, dual": lambda z, y, s: ridge(z, indicators(y, 3, z.dtype), s, True),
    "irls": lambda z, y, s: irls(z, y, 3, s, 4),
    "svm": lambda z, y, s: crammer_singer(z, y, 3, s),
}
CONVERGED = {"logistic regression": lambda z, y, s: logistic_regression(z, y, 3, 1.0)[0]}


def embeddings(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("d", [3, 12])
@pytest.mark.parametrize("strength", [0.05, 1.0])
def test_gradients_are_those_of_finite_differences(name, d, strength):
    z = embeddings(len(Y), d).requires_grad_()
    s = torch.tensor(strength).double().requires_grad_()
    assert gradcheck(lambda z, s: SOLVERS[name](z, Y, s), (z, s), fast_mode=True)


@pytest.mark.parametrize("name", SOLVERS)
def test_tasks_at_once_equal_one_by_one(name):
    z, s = embeddings(3, len(Y), 6).requires_grad_(), torch.tensor(0.3).double()
    ys = torch.stack([Y, Y.roll(1), Y.flip(0)])
    at_once = torch.vmap(lambda z, y: SOLVERS[name](z, y, s))(z, ys)
    one_by_one = torch.stack([SOLVERS[name](*one, s) for one in zip(z, ys, strict=True)])
    torch.testing.assert_close(at_once, one_by_one)
    slopes = [torch.autograd.grad(w.square().sum(), z)[0] for w in (at_once, one_by_one)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("name", [*SOLVERS, *CONVERGED])
def test_precision(name):
    """Float32 in and out, solved in float64 under autocast too; float32 alone is near (MPS)."""
    solve = (SOLVERS | CONVERGED)[name]
    z, s = embeddings(len(Y), 12), torch.tensor(0.3).double()
    exact = solve(z, Y, s).float()
    torch.testing.assert_close(solve(z.float(), Y, s), exact, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(solve(z.float(), Y, s), exact, rtol=1e-5, atol=1e-6)


def test_float32_alone_is_near():
    """What Apple's GPUs compute in."""
    z, y = task(d=64)
    for solve, least in ((crammer_singer, 0.1), (logistic_regression, 1.0)):
        exact, near = solve(z, y, 5, least), solve.__wrapped__(z.float(), y, 5, least)
        for a, b in zip(exact, near, strict=True):
            torch.testing.assert_close(a.float(), b, rtol=2e-3, atol=1e-3)


# The learners


def r2d2(base_learner="ridge", loss="cross_entropy"):
    return R2D2(nn.Flatten(), base_learner, 0.5, 3, None, None, steps=2, loss=loss)


def metaoptnet(base_learner="svm", smoothing=0.1, loss="cross_entropy"):
    return MetaOptNet(nn.Flatten(), base_learner, 2, 7, smoothing, None, None, loss)


def test_heads_scale_what_the_solvers_find():
    z, y = task()
    q = embeddings(4, 16)
    ones, m = torch.ones(len(y), 1).double(), len(y)
    zb, qb = torch.cat([z, ones], 1), torch.cat([q, ones[:4]], 1)
    binary = torch.from_numpy(one_vs_rest(y, 5))
    expected = {
        r2d2(): 3 * qb @ ridge(zb, binary, 0.5 * m).T,
        r2d2("logistic"): 3 * qb @ irls(zb, y, 5, 0.5 * m, 2).T,
        metaoptnet(): 7 * q @ crammer_singer(z, y, 5, 2.0).T,
        metaoptnet("ridge"): 7 * q @ ridge(z, binary, 1 / 2).T,
    }
    for learner, logits in expected.items():
        torch.testing.assert_close(learner.head(z, y, 5)(q), logits, rtol=1e-6, atol=1e-6)
    assert [k.label for k in expected] == ["R2-D2", "LR-D2", "MetaOptNet-SVM", "MetaOptNet-RR"]


def test_the_offset_is_learned_where_the_loss_sees_it():
    z, y = task()
    assert "offset" not in dict(r2d2().named_parameters())
    learner = r2d2(loss="binary_cross_entropy")
    with torch.no_grad():
        moved = copy.deepcopy(learner)
        moved.offset += 2
    torch.testing.assert_close(moved.head(z, y, 5)(z), learner.head(z, y, 5)(z) + 2)


def test_label_smoothing_is_the_papers_and_stays_in_training():
    """1 - epsilon for the right class, epsilon / (n - 1) for each of the others."""
    logits, y = embeddings(2, 3, 4), torch.tensor([[0, 3, 1], [2, 2, 0]])
    target = torch.full_like(logits, 0.1 / 3).scatter(2, y.unsqueeze(2), 0.9)
    expected = -(target * logits.log_softmax(2)).sum(2)
    learner = metaoptnet()
    torch.testing.assert_close(learner.train().loss(logits, y), expected)
    plain = -logits.log_softmax(2).gather(2, y.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(learner.eval().loss(logits, y), plain)
    with pytest.raises(UserError, match=r"label_smoothing: found 0.1 with learner.loss=mse"):
        metaoptnet(loss="mse")


def test_protonet_by_cosine_is_scikit_learns_cosine_of_class_means():
    z, y = task()
    q = embeddings(4, 16)
    learner = ProtoNet(nn.Flatten(), None, None, distance="cosine", scale=10, learn_scale=True)
    means = np.stack([z[y == c].mean(0) for c in range(5)])
    logits = learner.head(z, y, 5)(q)
    np.testing.assert_allclose(logits.detach(), 10 * cosine_similarity(q, means), rtol=1e-6)
    (slope,) = torch.autograd.grad(logits[0, 0], learner.scale)
    assert slope == pytest.approx(cosine_similarity(q, means)[0, 0])
    assert not list(ProtoNet(nn.Flatten(), None, None).parameters())  # old checkpoints fit


def test_heads_in_chunks_equal_heads_at_once(monkeypatch):
    z, y = embeddings(7, len(Y), 6), Y.expand(7, -1)
    learner = metaoptnet()
    at_once = learner.heads(z, y, z, 3)
    monkeypatch.setattr(embedding, "SOLVED", 2 * 3 * len(Y) ** 2)
    torch.testing.assert_close(learner.heads(z, y, z, 3), at_once)
