"""Heads against hand-derived numbers, other libraries and the formulas of their papers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn

from pipeline.heads.base import cosine
from pipeline.heads.baseline import Baseline
from pipeline.heads.bd_cspn import BdCspn, rectified_prototypes
from pipeline.heads.cosine import Cosine
from pipeline.heads.descent import adam, by_logits
from pipeline.heads.laplacian_shot import LaplacianShot, bound_updates, nearest_neighbours
from pipeline.heads.linear_probe import LinearProbe
from pipeline.heads.pt_map import PtMap, matched, power_transform, sinkhorn
from pipeline.heads.simple_shot import SimpleShot
from pipeline.heads.tim import Tim
from pipeline.heads.transductive_fine_tuning import TransductiveFineTuning
from tests.test_heads import make_embeddings


def waves(n: int, phase: float) -> Tensor:
    """(n, 4) embeddings between 0 and 2, written down as a formula."""
    i, j = torch.arange(n, dtype=torch.float64).unsqueeze(1), torch.arange(4, dtype=torch.float64)
    return 1 + torch.sin(phase + 1.7 * i + 0.9 * j + 0.3 * i * j)


SUPPORT, QUERY, Y = waves(6, 0.0), waves(6, 5.0), torch.tensor([0, 0, 1, 2, 2, 2])
NONE = torch.zeros(4, dtype=torch.float64)

# What easyfsl 1.5.0 gives in float64 for SUPPORT, Y and QUERY (torch 2.15, on a CPU).
BDCSPN = """0.597544 0.973063 0.809976  0.973659 0.522787 0.846016  0.786411 0.663464 0.835397
            0.665327 0.924739 0.858696  0.844497 0.445014 0.679380  0.816051 0.814943 0.909295"""
LAPLACIAN_SHOT = """
            0.005414 0.872044 0.122542  0.884802 0.001834 0.113364  0.373392 0.048662 0.577946
            0.041408 0.706142 0.252450  0.847520 0.010641 0.141840  0.156784 0.223199 0.620017"""
PTMAP = """ 0.129480 0.631526 0.238994  0.567244 0.065120 0.367635  0.337002 0.308131 0.354868
            0.182594 0.497696 0.319710  0.489243 0.104093 0.406665  0.294437 0.393434 0.312129"""
SIMPLE_SHOT = """
            0.651964 0.920408 0.768260  0.960768 0.449899 0.915065  0.803778 0.731930 0.798712
            0.712853 0.864518 0.827987  0.828069 0.328525 0.772673  0.844782 0.854180 0.869982"""
FINETUNE = """
            0.378278 0.684492 0.164386  0.895289 -0.072027 0.510194 0.839899 0.535922 -0.338476
            0.405854 0.527982 0.301457  0.763593 -0.150784 0.658031 0.803064 0.628030 -0.226404"""


def given(table: str) -> Tensor:
    return torch.tensor([float(x) for x in table.split()], dtype=torch.float64).view(6, 3)


def close(found: Tensor, expected: Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_easyfsl_bd_cspn():
    """Its weights are exp(cos), and its logits plain cosines: a sharpness of 1."""
    close(BdCspn("UN", 1.0)(SUPPORT, Y, 3, NONE)(QUERY), given(BDCSPN))


def test_easyfsl_laplacian_shot():
    """Its default knn of 3 counts the query itself; it may stop early, at changes of 1e-6."""
    head = LaplacianShot("UN", 1.0, neighbours=2, weight=0.7, steps=20)
    close(head(SUPPORT, Y, 3, NONE)(QUERY).softmax(1), given(LAPLACIAN_SHOT), atol=1e-4)


def test_easyfsl_pt_map():
    """PTMAP(power_factor=1, lambda_regularization=0.5): neither normalises nor centres."""
    log_plan = matched(SUPPORT + 1e-6, Y, 3, QUERY + 1e-6, 0.5, 0.2, 10, 200)
    close(log_plan.exp(), given(PTMAP), atol=1e-5)


def test_easyfsl_cosine():
    """Its SimpleShot is this, not the paper's nearest mean."""
    close(Cosine(1.0)(SUPPORT, Y, 3, NONE)(QUERY), given(SIMPLE_SHOT))


def test_easyfsl_finetune():
    """Finetune(50 steps, rate 0.01, temperature 5) on one image of unit length a class."""
    support = F.normalize(SUPPORT[[0, 2, 3]], dim=1)
    head = Baseline(cosine=True, steps=50, lr=1e-2, scale=5.0, weight_decay=0.0)
    close(head(support, torch.arange(3), 3, NONE)(QUERY) / 5, given(FINETUNE))


def task() -> tuple[Tensor, Tensor, Tensor]:
    s, y, q, _ = make_embeddings(tasks=1, shots=(1, 4, 2))
    return s[0].double(), y, q[0].double()


def descended(start: Tensor, loss, lr: float, steps: int, weight_decay: float = 0.0) -> Tensor:
    """By autograd and torch.optim."""
    w = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([w], lr=lr, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(w).backward()
        optimizer.step()
    return w.detach()


def test_adam_is_that_of_torch():
    target = torch.linspace(-2, 3, 12, dtype=torch.float64).view(3, 4)
    start = torch.zeros_like(target)
    found = adam(lambda w: (w - target) ** 3, start, 0.1, 40)
    close(found, descended(start, lambda w: ((w - target) ** 4).sum() / 4, 0.1, 40), atol=1e-12)
    assert not start.any()


def entropies(p: Tensor) -> tuple[Tensor, Tensor]:
    """H(Y) and H(Y|X) of predictions (q, n_way)."""
    mean = p.mean(0)
    return -(mean * mean.log()).sum(), -(p * p.log()).sum(1).mean()


def test_the_gradient_by_logits_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    y = F.one_hot(torch.tensor([0, 1, 1, 2])).T.double()

    def value(logits: Tensor) -> Tensor:
        p = logits.softmax(0).T  # (m+q, n_way)
        marginal, conditional = entropies(p[4:])
        return 0.3 * F.cross_entropy(logits.T[:4], y.T) - 0.7 * marginal + 0.2 * conditional

    found = by_logits(logits.log_softmax(0), y, 0.3, 0.7, 0.2)
    for i in range(3):
        for j in range(9):
            h = torch.zeros_like(logits)
            h[i, j] = 1e-5
            close(found[i, j], (value(logits + h) - value(logits - h)) / 2e-5, atol=1e-9)


def test_tim_is_what_autograd_makes_of_the_paper():
    """Eq. 1-4 with distances written out, descended by torch's Adam."""
    s, y, q = task()
    base = torch.full((12,), 0.3, dtype=torch.float64)
    head = Tim("CL2N", 30, 1e-2, 15.0, 0.1, 1.0, 0.2)
    s_n, q_n = F.normalize(s - base, dim=1), F.normalize(q - base, dim=1)

    def logits(w: Tensor, z: Tensor) -> Tensor:
        return -15 / 2 * (z.unsqueeze(1) - w).square().sum(2)

    def loss(w: Tensor) -> Tensor:
        marginal, conditional = entropies(logits(w, q_n).softmax(1))
        return 0.1 * F.cross_entropy(logits(w, s_n), y) - (marginal - 0.2 * conditional)

    start = torch.stack([s_n[y == k].mean(0) for k in range(3)])
    w = descended(start, loss, 1e-2, 30)
    assert loss(w) < loss(start) - 0.01
    close(head(s, y, 3, base)(q).softmax(1), logits(w, q_n).softmax(1), atol=1e-9)


def test_transductive_fine_tuning_is_what_autograd_makes_of_the_paper():
    s, y, q = task()
    head = TransductiveFineTuning(steps=25, lr=1e-2, scale=3.0, entropy_weight=0.5)
    s_n, q_n = F.normalize(s, dim=1), F.normalize(q, dim=1)

    def logits(w: Tensor, z: Tensor) -> Tensor:
        return 3 * (F.pad(z, (0, 1), value=1.0) @ w.T)

    def loss(w: Tensor) -> Tensor:
        _, conditional = entropies(logits(w, q_n).softmax(1))
        return F.cross_entropy(logits(w, s_n), y) + 0.5 * conditional

    start = F.normalize(torch.stack([s_n[y == k].mean(0) for k in range(3)]), dim=1)
    w = descended(F.pad(start, (0, 1)), loss, 1e-2, 25)
    close(head(s, y, 3, torch.zeros(12))(q), logits(w, q_n), atol=1e-9)


def test_baseline_is_a_linear_layer_of_torch():
    s, y, q = task()
    head = Baseline(cosine=False, steps=40, lr=0.05, scale=1.0, weight_decay=0.1)
    layer = nn.Linear(12, 3, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(layer(s), y).backward()
        optimizer.step()
    close(head(s, y, 3, torch.zeros(12))(q), layer(q).detach(), atol=1e-9)


def test_baseline_pp_is_what_autograd_makes_of_the_paper():
    s, y, q = task()
    head = Baseline(cosine=True, steps=40, lr=0.05, scale=4.0, weight_decay=0.1)

    def logits(w: Tensor, z: Tensor) -> Tensor:
        return 4 * F.cosine_similarity(z.unsqueeze(1), w, dim=2)

    start = F.normalize(torch.stack([s[y == k].mean(0) for k in range(3)]), dim=1)
    w = descended(start, lambda w: F.cross_entropy(logits(w, s), y), 0.05, 40, weight_decay=0.1)
    close(head(s, y, 3, torch.zeros(12))(q), logits(w, q), atol=1e-9)


@pytest.mark.parametrize("l2", [0.1, 1.0])
def test_the_linear_probe_is_that_of_scikit_learn(l2):
    s, y, q = task()
    found = LinearProbe("L2N", l2)(s, y, 3, torch.zeros(12))(q).softmax(1)
    model = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000)
    model.fit(F.normalize(s, dim=1).numpy(), y.numpy())
    expected = model.predict_proba(F.normalize(q, dim=1).numpy())
    close(found, torch.from_numpy(expected), atol=1e-6)


@pytest.mark.parametrize("features", ["UN", "L2N", "CL2N"])
def test_simple_shot_is_the_nearest_centroid_of_scikit_learn(features):
    s, y, q = task()
    base = torch.full((12,), 0.3, dtype=torch.float64)

    def transformed(z: Tensor) -> np.ndarray:
        z = z.numpy() - (0.3 if features == "CL2N" else 0)
        return z if features == "UN" else z / np.linalg.norm(z, axis=1, keepdims=True)

    model = NearestCentroid().fit(transformed(s), y.numpy())
    distances = ((transformed(q)[:, None] - model.centroids_) ** 2).sum(2)
    close(SimpleShot(features)(s, y, 3, base)(q), torch.from_numpy(-distances), atol=1e-12)


def test_rectified_prototypes_by_hand():
    """Two classes on the axes. The queries' mean is (1, 1), that of the support set too.

    Means (2, 0) and (0, 2); query (3, 1) has cosines 3 and 1 over sqrt 10, and joins class 0.
    """
    s, y = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    q = torch.tensor([[3.0, 1.0], [-1.0, 1.0]])
    e = 2.0
    a, b = np.exp(e), np.exp(e * 3 / np.sqrt(10))  # weights of (2, 0) and of (3, 1)
    c = np.exp(e / np.sqrt(2))  # of (-1, 1) beside (0, 2)
    expected = [[(2 * a + 3 * b) / (a + b), b / (a + b)], [-c / (a + c), (2 * a + c) / (a + c)]]
    close(rectified_prototypes(s, y, 2, q, e), torch.tensor(expected, dtype=torch.float32))
    shifted = rectified_prototypes(s, y, 2, q + torch.tensor([5.0, -7.0]), e)
    close(shifted, torch.tensor(expected, dtype=torch.float32), atol=1e-5)


def test_the_sharpest_rectification_is_the_nearest_image():
    """Of class 0 that is a query, shifted by (0, 1/3): no image of it lies at the class mean."""
    s, y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([0, 0, 1])
    means = rectified_prototypes(s, y, 2, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 1e4)
    close(means, torch.tensor([[1.0, 1 / 3], [-1.0, 0.0]]))


def test_cosines_near_one_do_not_tie_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    a, b = 3 + torch.rand(20, 64, generator=generator), 3 + torch.rand(5, 64, generator=generator)
    exact = F.cosine_similarity(a.double().unsqueeze(1), b.double(), dim=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = cosine(a, b)
    close(found.double(), exact, atol=1e-6)
    assert cosine(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_the_power_transform_by_hand():
    z = torch.tensor([[9.0, 16.0], [16.0, 9.0]], dtype=torch.float64)  # roots (3, 4) and (4, 3)
    half = 0.5**0.5
    expected = torch.tensor([[-half, half], [half, -half]], dtype=torch.float64)
    close(power_transform(z, 0.5), expected)
    generator = torch.Generator().manual_seed(0)
    signed = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    close(power_transform(-signed, 0.5), -power_transform(signed, 0.5), atol=1e-12)


@pytest.mark.parametrize("sharpness", [1.0, 10.0])
def test_the_transport_has_its_margins_and_its_form(sharpness):
    """Those margins and the form u_i v_k exp(-l c) are what the one optimum has."""
    generator = torch.Generator().manual_seed(0)
    cost = 0.5 * torch.rand(12, 3, generator=generator, dtype=torch.float64)
    log_plan = sinkhorn(cost, sharpness, 200)
    close(log_plan.exp().sum(1), torch.ones(12, dtype=torch.float64), atol=1e-12)
    close(log_plan.exp().sum(0), torch.full((3,), 4.0, dtype=torch.float64), atol=1e-6)
    scaled = log_plan + sharpness * cost  # log u_i + log v_k
    centred = scaled - scaled.mean(0) - scaled.mean(1, keepdim=True) + scaled.mean()
    close(centred, torch.zeros_like(centred), atol=1e-12)


def test_the_sharpest_transport_of_the_farthest_images_is_finite():
    cost = torch.tensor([[0.0, 4.0, 4.0]]).expand(9, 3)
    log_plan = sinkhorn(cost, 20.0, 100)
    close(log_plan.exp(), torch.full((9, 3), 1 / 3), atol=1e-5)


def test_pt_map_shares_the_queries_out_equally():
    s, y, q, of_query = make_embeddings(queries=6)
    head = PtMap(0.5, 10.0, 0.2, 20, 100)
    for a, b in zip(s, q, strict=True):
        found = head(a, y, 3, torch.zeros(12))(b).exp().sum(0)
        close(found, torch.full((3,), 6.0), atol=0.05)
    right = [(head(a, y, 3, torch.zeros(12))(b).argmax(1) == of_query) for a, b in zip(s, q, strict=True)]  # fmt: skip
    assert torch.stack(right).float().mean() > 0.9


def test_bound_updates_lower_the_objective_to_a_stationary_point():
    """With W positive semi-definite, here a Gaussian kernel."""
    _, _, q = task()
    affinity = torch.exp(-0.5 * torch.cdist(q, q).square())
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(15, 3, generator=generator, dtype=torch.float64)

    def objective(y: Tensor) -> float:
        return float((y * y.log() + y * cost).sum() - 0.6 / 2 * (y * (affinity @ y)).sum())

    found = [bound_updates(cost, affinity, 0.6, steps).softmax(1) for steps in range(60)]
    values = [objective(y) for y in found]
    assert all(b <= a + 1e-12 for a, b in pairwise(values))
    assert values[-1] < values[0] - 0.01
    last = found[-1].requires_grad_()
    slope = torch.autograd.grad(
        (last * last.log() + last * cost).sum() - 0.3 * (last * (affinity @ last)).sum(), last
    )[0]
    close(slope - slope.mean(1, keepdim=True), torch.zeros_like(slope), atol=1e-6)


def test_nearest_neighbours_leave_out_the_query_itself():
    z = torch.tensor([[0.0], [0.0], [1.0], [3.0], [10.0]])  # the first two are alike
    expected = [[0, 1, 1, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0]]
    found = nearest_neighbours(z, 2)
    assert found.sum(1).tolist() == [2] * 5
    rows = [0, 1, 2, 4]  # the fourth has a tie
    assert found[rows].tolist() == [[float(x) for x in expected[i]] for i in rows]
    assert nearest_neighbours(z[:1], 2).tolist() == [[0.0]]
    assert nearest_neighbours(z[:2], 2).tolist() == [[0.0, 1.0], [1.0, 0.0]]
