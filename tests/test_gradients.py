"""Meta-gradients against finite differences and against derivations written out here."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from pipeline.backbones import Conv4
from pipeline.episode import Episode
from pipeline.errors import UserError
from pipeline.learners.maml import Maml
from pipeline.learners.protonet import ProtoNet
from pipeline.learners.reptile import Reptile

ADAM = partial(torch.optim.Adam, lr=1e-3)


def task(seed: int = 0, k_shot: int = 2) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    images = partial(torch.randn, dtype=torch.float64, generator=generator)
    support_y, query_y = torch.arange(3).repeat(k_shot), torch.arange(3).repeat(4)
    return Episode(
        images(3 * k_shot, 1, 20, 20),
        support_y,
        images(12, 1, 20, 20),
        query_y,
        torch.tensor(seed),
        3,
    )


def meta_batch(*seeds: int) -> Episode:
    tasks = [task(seed)[:-1] for seed in seeds]
    return Episode(*(torch.stack(f) for f in zip(*tasks, strict=True)), 3)


def maml(steps=2, first_order=False, adapted="all", norm="batch_stats") -> Maml:
    torch.manual_seed(0)
    net = Conv4(1, 20, 6, norm, "stride")
    return Maml(net, 3, 0.1, steps, steps, first_order, adapted, ADAM, None).double()


def meta_gradient(learner, batch) -> dict[str, torch.Tensor]:
    learner.zero_grad()
    learner.meta_loss(batch)[0].backward()
    return {k: p.grad.clone() for k, p in learner.net.named_parameters()}


def query_loss(net: nn.Module, episode: Episode, lr: float, steps: int, adapted: str) -> float:
    """The outer loss of MAML by plain autograd on a module with its parameters replaced."""
    phi = {k: v.detach().clone().requires_grad_() for k, v in net.named_parameters()}
    names = [k for k in phi if adapted in ("all", k.partition(".")[0])]
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(net, phi, (episode.support_x,)), episode.support_y)
        for k, g in zip(names, torch.autograd.grad(loss, [phi[k] for k in names]), strict=True):
            phi[k] = (phi[k] - lr * g).detach().requires_grad_()
    return F.cross_entropy(functional_call(net, phi, (episode.query_x,)), episode.query_y).item()


@pytest.mark.parametrize("norm", ["batch_stats", "group"])
@pytest.mark.parametrize("adapted", ["all", "head", "body"])
@pytest.mark.parametrize("steps", [1, 3])
def test_maml_against_finite_differences(norm, adapted, steps):
    learner = maml(steps, adapted=adapted, norm=norm)
    gradient = meta_gradient(learner, meta_batch(0, 1))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = {
            k: torch.randn(v.shape, dtype=v.dtype, generator=generator) for k, v in gradient.items()
        }
        slope = sum((gradient[k] * d).sum().item() for k, d in direction.items())

        def at(t: float, direction=direction) -> float:
            moved = maml(steps, adapted=adapted, norm=norm).net
            with torch.no_grad():
                for k, p in moved.named_parameters():
                    p += t * direction[k]
            return sum(query_loss(moved, task(s), 0.1, steps, adapted) for s in (0, 1)) / 2

        h = 1e-7
        assert slope == pytest.approx((at(h) - at(-h)) / (2 * h), rel=2e-5, abs=1e-7)


def test_fomaml_is_the_gradient_at_the_adapted_point():
    learner, episode = maml(2, first_order=True), task()
    gradient = meta_gradient(learner, meta_batch(0))
    phi = {k: v.detach().clone().requires_grad_() for k, v in learner.net.named_parameters()}
    for _ in range(2):
        loss = F.cross_entropy(
            functional_call(learner.net, phi, (episode.support_x,)), episode.support_y
        )
        steps = torch.autograd.grad(loss, list(phi.values()))
        phi = {
            k: (v - 0.1 * g).detach().requires_grad_()
            for (k, v), g in zip(phi.items(), steps, strict=True)
        }
    loss = F.cross_entropy(functional_call(learner.net, phi, (episode.query_x,)), episode.query_y)
    for k, g in zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True):
        torch.testing.assert_close(gradient[k], g, rtol=1e-10, atol=1e-12)
    second = meta_gradient(maml(2), meta_batch(0))
    assert any(not torch.allclose(second[k], gradient[k], rtol=1e-3) for k in gradient)


def test_first_order_anil_takes_the_inner_gradient_as_a_constant():
    learner, episode = maml(2, adapted="head", first_order=True), task()
    gradient = meta_gradient(learner, meta_batch(0))
    body, head = learner.net.body, learner.net.head
    with torch.no_grad():
        support, phi = body(episode.support_x), (head.weight.clone(), head.bias.clone())
    for _ in range(2):
        phi = [p.requires_grad_() for p in phi]
        steps = torch.autograd.grad(
            F.cross_entropy(F.linear(support, *phi), episode.support_y), phi
        )
        phi = [(p - 0.1 * g).detach() for p, g in zip(phi, steps, strict=True)]
    phi = [p.requires_grad_() for p in phi]
    loss = F.cross_entropy(F.linear(body(episode.query_x), *phi), episode.query_y)
    names = [k for k in gradient if k.startswith("body.")]
    parameters = dict(learner.net.named_parameters())
    expected = torch.autograd.grad(loss, [*(parameters[k] for k in names), *phi])
    for k, g in zip([*names, "head.weight", "head.bias"], expected, strict=True):
        torch.testing.assert_close(gradient[k], g, rtol=1e-10, atol=1e-12)


def test_a_meta_batch_is_the_mean_of_its_tasks():
    learner = maml()
    apart = [meta_gradient(learner, meta_batch(s)) for s in (0, 1, 2)]
    together = meta_gradient(learner, meta_batch(0, 1, 2))
    for k, g in together.items():
        torch.testing.assert_close(g, sum(a[k] for a in apart) / 3, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("inner", [torch.optim.SGD, partial(torch.optim.Adam, betas=(0.0, 0.999))])
def test_reptile_is_theta_minus_phi(inner):
    torch.manual_seed(0)
    inner = partial(inner, lr=0.05)
    learner = Reptile(
        Conv4(1, 20, 6, "group", "stride"), 3, inner, 3, 3, 100, ADAM, None
    ).double()  # fmt: skip
    gradient = meta_gradient(learner, meta_batch(0, 1))
    expected = {k: torch.zeros_like(v) for k, v in learner.net.named_parameters()}
    for seed in (0, 1):
        episode = task(seed)
        twin = Reptile(Conv4(1, 20, 6, "group", "stride"), 3, inner, 3, 3, 100, ADAM, None).double()
        twin.load_state_dict(learner.state_dict())
        optimizer = inner(twin.net.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(twin.net(episode.support_x), episode.support_y).backward()
            optimizer.step()
        for (k, theta), phi in zip(
            learner.net.named_parameters(), twin.net.parameters(), strict=True
        ):
            expected[k] += (theta - phi).detach() / 2
    for k, g in gradient.items():
        torch.testing.assert_close(g, expected[k], rtol=1e-6, atol=1e-10)  # sums in other orders


def test_reptiles_inner_batches_pass_over_the_support_set():
    """Again and again, each pass in another order, which is the episode's."""
    net = Conv4(1, 20, 6, "group", "stride")
    learner = Reptile(net, 3, partial(torch.optim.SGD, lr=0.1), 5, 1, 4, ADAM, None)
    parts = learner._batches(10, episode=7)
    assert [len(part) for part in parts] == [4] * 5
    seen = torch.cat(parts).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert torch.cat(learner._batches(10, episode=7)).tolist() == seen
    assert torch.cat(learner._batches(10, episode=8)).tolist() != seen
    assert [len(part) for part in learner._batches(3, episode=7)] == [3] * 5


def test_protonet_against_numpy_with_unbalanced_classes():
    learner = ProtoNet(nn.Flatten(), ADAM, None)
    rng = np.random.default_rng(0)
    x, q = rng.normal(size=(6, 1, 3, 3)), rng.normal(size=(4, 1, 3, 3))
    y = np.array([1, 0, 1, 2, 1, 0])
    means = np.stack([x[y == c].reshape(-1, 9).mean(0) for c in range(3)])
    expected = -((q.reshape(-1, 1, 9) - means) ** 2).sum(-1)
    logits = learner.adapt(torch.from_numpy(x), torch.from_numpy(y))(torch.from_numpy(q))
    np.testing.assert_allclose(logits, expected, rtol=1e-10)


def test_running_statistics_and_other_ways_are_refused():
    with pytest.raises(UserError, match=r"backbone\.norm: 'batch' .* allowed"):
        maml(norm="batch")
    episode = task()
    keep = episode.support_y < 2
    with pytest.raises(ValueError, match=r"n_way: 2 classes, but this MAML was trained for 3"):
        maml().adapt(episode.support_x[keep], episode.support_y[keep])


def test_evaluation_keeps_no_graph():
    learner, episode = maml(), task()
    logits = learner.eval().adapt(episode.support_x, episode.support_y)(episode.query_x)
    assert not logits.requires_grad
