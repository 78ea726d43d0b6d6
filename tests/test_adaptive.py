"""Meta-SGD, MAML++, Meta-Curvature and CAVIA against plain autograd, NumPy and MAML itself.

The oracle of each is written out here: parameters by name, `torch.autograd.grad`, and Kronecker
products, batch norms and contexts spelled out.
"""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.backbones import MLP, Conv4, ResNet12
from pipeline.episode import Episode
from pipeline.errors import UserError
from pipeline.inner import Adam
from pipeline.learners import maml_plus_plus
from pipeline.learners.cavia import Cavia
from pipeline.learners.gradient import GradientLearner
from pipeline.learners.maml import Maml
from pipeline.learners.maml_plus_plus import MamlPlusPlus, multi_step_weights
from pipeline.learners.meta_curvature import MetaCurvature
from pipeline.learners.meta_sgd import MetaSgd
from tests.test_engine import two_threads  # noqa: F401  # a fixture
from tests.test_gradients import meta_batch, task

OUTER = partial(torch.optim.Adam, lr=1e-3), None
Parameters = dict[str, Tensor]


def conv(norm: str = "batch_stats") -> Conv4:
    torch.manual_seed(0)
    return Conv4(1, 20, 6, norm, "stride")


def exact(learner: GradientLearner) -> GradientLearner:
    """In double precision, where 0.1 is another number than in single."""
    with torch.no_grad():
        for rate in learner.double().rates.values():
            rate.fill_(0.1)
    return learner


def maml(steps=2, first_order=False, adapted="all", norm="batch_stats") -> Maml:
    return Maml(conv(norm), 3, 0.1, steps, steps, first_order, adapted, *OUTER).double()


def meta_sgd(steps=2, first_order=False, adapted="all", norm="batch_stats", **other) -> MetaSgd:
    net = conv(norm)
    return exact(MetaSgd(net, 3, 0.1, steps, steps, first_order, adapted, *OUTER, **other))


def curvature(steps=2, first_order=False, adapted="all", norm="batch_stats", **other):
    net = conv(norm)
    return MetaCurvature(net, 3, 0.1, steps, steps, first_order, adapted, *OUTER, **other).double()


def plus_plus(
    steps=2, until=0, second_from=0, per_step=True, running=False, adapted="all",
    norm="batch_stats", **other,
) -> MamlPlusPlus:  # fmt: skip
    return exact(MamlPlusPlus(
        conv(norm), 3, 0.1, steps, steps, until, second_from, per_step, running, adapted, *OUTER,
        **other,
    ))  # fmt: skip


def cavia(steps=2, first_order=False, modulation="scale_shift", norm="batch_stats", **other):
    net = conv(norm)
    return Cavia(net, 3, 5, modulation, 1.0, steps, steps, first_order, *OUTER, **other).double()


def stirred(learner: GradientLearner) -> GradientLearner:
    """The learner at a place where nothing is an identity, or equal to another."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in learner.named_parameters():
            size = 0.02 if name.startswith("rates") else 0.2
            p += size * torch.randn(p.shape, dtype=p.dtype, generator=generator)
    return learner


def values(learner: GradientLearner) -> Parameters:
    """All meta-parameters, by the names of the network's where they belong to one of them."""
    return {k.replace("/", "."): v.detach().clone() for k, v in learner.named_parameters()}


def meta_gradient(learner: GradientLearner, batch: Episode) -> Parameters:
    learner.zero_grad()
    learner.meta_loss(batch)[0].backward()
    return {k.replace("/", "."): p.grad.clone() for k, p in learner.named_parameters()}


def descend(phi: Parameters, loss, direction, steps: int) -> list[Parameters]:
    """Every place of a descent by plain autograd, as constants; `direction` of (name, grad, t)."""
    places = [phi]
    for t in range(steps):
        phi = {k: v.detach().requires_grad_() for k, v in phi.items()}
        grads = torch.autograd.grad(loss(phi, t), list(phi.values()))
        phi = {
            k: (v - direction(k, g, t)).detach()
            for (k, v), g in zip(phi.items(), grads, strict=True)
        }
        places.append(phi)
    return places


def network(learner, p: Parameters):
    """From adapted parameters and images to logits, the others as they are in p."""
    net = {k.removeprefix("net."): v for k, v in p.items() if k.startswith("net.")}
    return net, lambda phi, x: functional_call(learner.net, net | phi, (x,))


def by_maml_rule(learner, p, episode, steps, direction):
    net, predict = network(learner, p)
    names = [k for k in net if learner.adapted in ("all", k.partition(".")[0])]
    *_, phi = descend(
        {k: net[k] for k in names},
        lambda phi, t: F.cross_entropy(predict(phi, episode.support_x), episode.support_y),
        direction,
        steps,
    )
    return [predict(phi, episode.query_x)]


def meta_sgd_logits(learner, p, episode, steps):
    head = "head." if learner.adapted == "head" else ""  # names of rates lack it
    rate = lambda k: p[f"rates.{k.removeprefix(head)}"]  # noqa: E731
    return by_maml_rule(learner, p, episode, steps, lambda k, g, t: rate(k) * g)


def curvature_logits(learner, p, episode, steps):
    head = "head." if learner.adapted == "head" else ""

    def direction(name: str, grad: Tensor, t: int) -> Tensor:
        name = f"curvature.{name.removeprefix(head)}"
        if grad.dim() == 1:
            return 0.1 * p[f"{name}.scale"] * grad
        whole = torch.kron(p[f"{name}.out"], p[f"{name}.in"])
        if grad.dim() == 4:
            whole = torch.kron(whole, p[f"{name}.filter"])
        return 0.1 * (whole @ grad.reshape(-1)).view(grad.shape)

    return by_maml_rule(learner, p, episode, steps, direction)


def plus_plus_logits(learner, p, episode, steps):
    """After each step."""
    net, predict = network(learner, p)
    norms = [k for k in net if ".norm." in k] if learner.per_step_norms else []

    def norm(t: int) -> Parameters:
        t = min(t, learner.inner_steps - 1)
        return {k: net[k] if t == 0 else p[f"later_norms.{k}"][t - 1] for k in norms}

    places = descend(
        {k: v for k, v in net.items() if k not in norms},
        lambda phi, t: F.cross_entropy(
            predict(phi | norm(t), episode.support_x), episode.support_y
        ),
        lambda k, g, t: p[f"rates.{k}"][min(t, learner.inner_steps - 1)] * g,
        steps,
    )
    return [predict(phi | norm(t), episode.query_x) for t, phi in enumerate(places[1:])]


def cavia_logits(learner, p, episode, steps):
    def block(x: Tensor, at: str) -> Tensor:
        bias = p.get(f"{at}.conv.bias")
        y = F.conv2d(x, p[f"{at}.conv.weight"], bias, stride=2, padding=1)
        scale, shift = p[f"{at}.norm.weight"], p[f"{at}.norm.bias"]
        if bias is not None:
            return F.group_norm(y, 1, scale, shift)  # 6 channels are one group
        return F.batch_norm(y, None, None, scale, shift, training=True)

    def predict(context: Tensor, x: Tensor) -> Tensor:
        x = block(block(x, "net.body.0").relu(), "net.body.1").relu()
        x, at = block(x, "net.body.2.block"), "net.head.context"
        if f"{at}.scale.weight" in p:
            scale = p[f"{at}.scale.weight"] @ context + p[f"{at}.scale.bias"]
            x = x * scale.view(1, -1, 1, 1)
        x = x + (p[f"{at}.shift.weight"] @ context + p[f"{at}.shift.bias"]).view(1, -1, 1, 1)
        x = block(x.relu(), "net.head.rest.1").relu().flatten(1)
        return F.linear(x, p["net.head.rest.3.weight"], p["net.head.rest.3.bias"])

    *_, phi = descend(
        {"context": torch.zeros(5, dtype=torch.float64)},
        lambda phi, t: F.cross_entropy(
            predict(phi["context"], episode.support_x), episode.support_y
        ),
        lambda k, g, t: g,
        steps,
    )
    return [predict(phi["context"], episode.query_x)]


MULTI = {"until": 10}  # at outer step 0 all inner steps weigh the same
CASES = {
    "meta_sgd": (partial(meta_sgd), meta_sgd_logits),
    "meta_sgd head": (partial(meta_sgd, adapted="head"), meta_sgd_logits),
    "meta_sgd body": (partial(meta_sgd, adapted="body", norm="group"), meta_sgd_logits),
    "curvature": (partial(curvature), curvature_logits),
    "curvature head": (partial(curvature, adapted="head"), curvature_logits),
    "curvature group": (partial(curvature, norm="group"), curvature_logits),
    "plus_plus": (partial(plus_plus, **MULTI), plus_plus_logits),
    "plus_plus last": (partial(plus_plus, steps=3), plus_plus_logits),
    "plus_plus group": (partial(plus_plus, norm="group", **MULTI), plus_plus_logits),
    "plus_plus shared": (partial(plus_plus, per_step=False, **MULTI), plus_plus_logits),
    "cavia": (partial(cavia), cavia_logits),
    "cavia shift": (partial(cavia, modulation="shift", norm="group"), cavia_logits),
}
each_case = pytest.mark.parametrize("case", CASES)


def outer_loss(learner, logits_of, p: Parameters, seeds: tuple[int, ...]) -> float:
    total = 0.0
    for episode in map(task, seeds):
        losses = [
            F.cross_entropy(logits, episode.query_y).item()
            for logits in logits_of(learner, p, episode, learner.inner_steps)
        ]
        multi = isinstance(learner, MamlPlusPlus) and learner.multi_step_until
        total += float(np.mean(losses)) if multi else losses[-1]
    return total / len(seeds)


@each_case
def test_meta_gradients_are_those_of_finite_differences(case):
    build, logits_of = CASES[case]
    learner = stirred(build())
    gradient, at = meta_gradient(learner, meta_batch(0, 1)), values(learner)
    own = [k for k in at if not k.startswith("net.") or "context" in k]
    generator = torch.Generator().manual_seed(1)
    for names in (list(at), own):
        way = {k: torch.randn(at[k].shape, dtype=torch.float64, generator=generator) for k in names}
        slope = sum((gradient[k] * d).sum().item() for k, d in way.items())
        h = 1e-7
        ahead, behind = (
            outer_loss(learner, logits_of, at | {k: at[k] + s * way[k] for k in names}, (0, 1))
            for s in (h, -h)
        )
        assert slope == pytest.approx((ahead - behind) / (2 * h), rel=2e-5, abs=1e-7)
        assert abs(slope) > 1e-3


@each_case
def test_classifiers_are_those_of_plain_autograd_also_in_more_steps(case):
    build, logits_of = CASES[case]
    learner, episode = stirred(build()).eval(), task()
    for steps in (1, 2, 5):
        expected = logits_of(learner, values(learner), episode, steps)[-1].detach()
        with torch.inference_mode():
            logits = learner.adapt_in(steps, episode.support_x, episode.support_y)(episode.query_x)
        torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-10)


MODES = CASES | {
    "meta_sgd adam": (partial(meta_sgd, inner_rule=Adam()), None),
    "curvature adam": (partial(curvature, inner_rule=Adam()), None),
    "plus_plus adam": (partial(plus_plus, inner_rule=Adam(), **MULTI), None),
    "plus_plus first order": (partial(plus_plus, second_from=1, **MULTI), None),
    "plus_plus running": (partial(plus_plus, running=True, **MULTI), None),
    "plus_plus running shared": (partial(plus_plus, running=True, per_step=False), None),
    "cavia adam": (partial(cavia, inner_rule=Adam()), None),
    "cavia first order": (partial(cavia, first_order=True), None),
}


def close(ours: Parameters, mamls: Parameters) -> None:
    for k, g in mamls.items():
        torch.testing.assert_close(ours[k], g, rtol=1e-8, atol=1e-10)


def gradient_and_logits(learner: GradientLearner, batch: Episode) -> Parameters:
    gradient = meta_gradient(stirred(learner), batch)
    with torch.inference_mode():
        return gradient | {"logits": learner.eval().predict(batch)}


@pytest.mark.parametrize("case", MODES)
def test_loop_and_vmap_are_one_function(case):
    build, batch = MODES[case][0], meta_batch(0, 1)
    loop, vmap = (gradient_and_logits(build(engine=mode), batch) for mode in ("loop", "vmap"))
    close(vmap, loop)


@pytest.mark.parametrize("case", ["plus_plus running", "cavia"])
def test_threads_change_nothing(case, two_threads):  # noqa: F811
    build, batch = MODES[case][0], meta_batch(0, 1)
    threaded = gradient_and_logits(build(engine="loop"), batch)
    torch.set_num_threads(1)
    alone = gradient_and_logits(build(engine="loop"), batch)
    assert all(torch.equal(threaded[k], alone[k]) for k in alone)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("adapted", ["all", "head", "body"])
@pytest.mark.parametrize("build", [meta_sgd, curvature])
def test_where_it_starts_it_is_maml(build, adapted, first_order):
    batch, options = meta_batch(0, 1), (2, first_order, adapted)
    close(meta_gradient(build(*options), batch), meta_gradient(maml(*options), batch))


@pytest.mark.parametrize("steps", [1, 3])
def test_maml_plus_plus_without_its_tricks_is_maml(steps):
    batch = meta_batch(0, 1)
    plain = plus_plus(steps, per_step=False)
    close(meta_gradient(plain, batch), meta_gradient(maml(steps), batch))


def published_weights(steps: int, epoch: int, epochs: int) -> np.ndarray:
    """get_per_step_loss_importance_vector of AntreasAntoniou/HowToTrainYourMAMLPytorch."""
    weights = np.full(steps, 1.0 / steps)
    rate, least = 1.0 / steps / epochs, 0.03 / steps
    weights[:-1] = np.maximum(weights[:-1] - epoch * rate, least)
    most = 1.0 - (steps - 1) * least
    weights[-1] = np.minimum(weights[-1] + epoch * (steps - 1) * rate, most)
    return weights


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("epochs", [10, 100])
def test_multi_step_weights_are_the_published_ones(steps, epochs):
    for epoch in range(epochs):
        ours = multi_step_weights(steps, epoch / epochs)
        np.testing.assert_allclose(ours, published_weights(steps, epoch, epochs), atol=1e-12)


@pytest.mark.parametrize("outer_step", [0, 7, 10, 11])
def test_the_multi_step_loss_is_a_sum_of_mamls(outer_step, monkeypatch):
    monkeypatch.setattr(MamlPlusPlus, "global_step", outer_step)
    batch, learner = meta_batch(0, 1), plus_plus(3, until=10, per_step=False)
    weights = published_weights(3, outer_step, 10) if outer_step < 10 else [0, 0, 1]
    parts = [meta_gradient(maml(k), batch) for k in (1, 2, 3)]
    expected = {k: sum(w * p[k] for w, p in zip(weights, parts, strict=True)) for k in parts[0]}
    close(meta_gradient(learner, batch), expected)
    _, loss, acc = learner.meta_loss(batch)
    _, final_loss, final_acc = maml(3).meta_loss(batch)
    assert (loss.item(), acc.item()) == pytest.approx((final_loss.item(), final_acc.item()))


def test_the_multi_step_loss_walks_once(monkeypatch):
    calls, step = [], maml_plus_plus.inner_step
    monkeypatch.setattr(maml_plus_plus, "inner_step", lambda *a: calls.append(0) or step(*a))
    plus_plus(4, until=10).meta_loss(meta_batch(0))
    assert len(calls) == 4


@pytest.mark.parametrize(("outer_step", "first_order"), [(0, True), (4, True), (5, False)])
def test_the_order_of_derivatives_is_annealed(outer_step, first_order, monkeypatch):
    monkeypatch.setattr(MamlPlusPlus, "global_step", outer_step)
    batch = meta_batch(0, 1)
    learner = plus_plus(3, second_from=5, per_step=False)
    close(meta_gradient(learner, batch), meta_gradient(maml(3, first_order), batch))


def mlp_plus_plus() -> MamlPlusPlus:
    torch.manual_seed(0)
    net = MLP(1, 20, [7], "batch_stats")
    return exact(MamlPlusPlus(net, 3, 0.1, 1, 1, 0, 0, True, True, "all", *OUTER))


def test_running_statistics_are_those_of_adapted_queries():
    learner, episode = stirred(mlp_plus_plus()), task()
    p = values(learner)
    names = ["net.body.layers.0.0.weight", "net.body.layers.0.0.bias"]
    seen = np.stack([np.zeros(7), np.ones(7)])
    net, predict = network(learner, p)
    for _ in range(3):
        learner._keep_statistics(episode)
        _, phi = descend(
            {k: v for k, v in net.items() if not k.startswith("body.layers.0.1.")},
            lambda phi, t: F.cross_entropy(predict(phi, episode.support_x), episode.support_y),
            lambda k, g, t: p[f"rates.{k}"][0] * g,
            1,
        )
        weight, bias = (phi[k.removeprefix("net.")].numpy() for k in names)
        before = episode.query_x.flatten(1).numpy() @ weight.T + bias
        seen = 0.9 * seen + 0.1 * np.stack([before.mean(0), before.var(0, ddof=1)])
    (rows,) = learner.statistics.buffers()
    np.testing.assert_allclose(rows[0], seen, rtol=1e-9)
    assert not any(m._forward_pre_hooks for m in learner.modules())
    logits = learner.eval().adapt(episode.support_x, episode.support_y)(episode.query_x)
    scale, shift = (p[f"net.body.layers.0.1.{k}"].numpy() for k in ("weight", "bias"))
    hidden = (before - seen[0]) / np.sqrt(seen[1] + 1e-5) * scale + shift
    expected = np.maximum(hidden, 0) @ phi["head.weight"].T.numpy() + phi["head.bias"].numpy()
    np.testing.assert_allclose(logits.detach(), expected, rtol=1e-8)


@pytest.mark.parametrize("running", [False, True])
def test_running_statistics_make_it_inductive(running):
    learner, episode = stirred(plus_plus(running=running)), task()
    learner.train()
    if running:
        learner._keep_statistics(episode)
        rows = list(learner.statistics.buffers())
        assert [tuple(r.shape) for r in rows] == [(2, 2, 6)] * 4
        assert all((r[0] != r[1]).any() for r in rows)
    classify = learner.eval().adapt(episode.support_x, episode.support_y)
    alone = torch.cat([classify(x) for x in episode.query_x.split(3)])
    assert torch.allclose(alone, classify(episode.query_x), rtol=1e-9) == running
    assert learner.protocol == ("inductive" if running else "transductive")


@pytest.mark.parametrize("modulation", ["shift", "scale_shift"])
def test_cavia_in_a_linear_model_by_hand(modulation):
    """One hidden layer whose units are all active; the loss is the mean square of its outputs."""
    torch.manual_seed(0)
    body = MLP(1, 2, [6], "none")
    learner = Cavia(body, 2, 3, modulation, 1e-4, 1, 1, False, *OUTER, loss="mse").double()
    linear, (context, rest) = learner.net.body[1], learner.net.head
    head = rest[-1]
    with torch.no_grad():
        linear.bias += 10
    x, y = task().support_x[:5, :, :2, :2], torch.randn(5, 2, dtype=torch.float64)
    hidden, out = (linear(x.flatten(1))).detach().numpy(), head.weight.detach().numpy()
    error = hidden @ out.T + head.bias.detach().numpy() - y.numpy()
    upstream = (2 / error.size) * error @ out  # (5, 6)
    gradient = context.shift.weight.detach().numpy().T @ upstream.sum(0)
    scale = np.ones(6)
    if modulation == "scale_shift":
        film = context.scale.weight.detach().numpy()
        gradient += film.T @ (upstream * hidden).sum(0)
    c = -1e-4 * gradient
    if modulation == "scale_shift":
        scale = 1 + film @ c
    hidden = hidden * scale + context.shift.weight.detach().numpy() @ c
    assert (hidden > 0).all()
    expected = hidden @ out.T + head.bias.detach().numpy()
    classify = learner.adapt_from(learner.theta(), x, y, 1)
    np.testing.assert_allclose(classify(x).detach(), expected, rtol=1e-10)


def test_cavia_computes_what_lies_below_the_context_once():
    learner, calls = cavia(steps=3), []
    learner.net.body.register_forward_hook(lambda *_: calls.append(0))
    learner.meta_loss(meta_batch(0))
    assert len(calls) == 2  # support and query


def test_cavia_learns_a_sinusoid():
    """A pixel is x and 10 of them are a task; the context finds amplitude and phase."""
    torch.manual_seed(0)
    body = MLP(1, 1, [40, 40], "none")
    learner = Cavia(body, 1, 5, "shift", 1.0, 1, 1, False, *OUTER, loss="mse", engine="vmap")
    generator = torch.Generator().manual_seed(0)

    def batch(tasks: int) -> Episode:
        draw = partial(torch.rand, generator=generator)
        x, amplitude, phase = (
            10 * draw(tasks, 20, 1) - 5,
            5 * draw(tasks, 1, 1),
            3 * draw(tasks, 1, 1),
        )
        y, x = amplitude * torch.sin(x - phase), x.unflatten(2, (1, 1, 1))
        return Episode(x[:, :10], y[:, :10], x[:, 10:], y[:, 10:], torch.arange(tasks), 1)

    optimizer = torch.optim.Adam(learner.parameters(), 3e-3)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        objective, loss, _ = learner.meta_loss(batch(25))
        objective.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


def test_meta_sgd_draws_one_first_rate():
    torch.manual_seed(0)
    body = conv()
    learner = MetaSgd(body, 3, (0.005, 0.1), 1, 1, False, "all", *OUTER)
    rates = torch.cat([r.flatten() for r in learner.rates.values()])
    assert 0.005 <= rates[0] <= 0.1
    assert (rates == rates[0]).all()
    assert len(rates) == sum(p.numel() for p in learner.net.parameters())


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (partial(plus_plus, adapted="head"), r"learner\.adapted: found head, .* both must then be"),
        (
            partial(plus_plus, running=True, norm="group"),
            r"learner\.running_statistics: found true",
        ),
        (
            lambda: Cavia(
                ResNet12(1, (2, 2, 2, 2), "none", 0.0, 1), 3, 5, "shift", 1.0, 1, 1, False, *OUTER
            ),
            r"backbone: found ResNet12; CAVIA takes conv4 or mlp",
        ),
    ],
)
def test_what_does_not_fit_is_said(build, line):
    with pytest.raises(UserError, match=line):
        build()


def test_norms_and_rates_of_a_step_are_few():
    learner = plus_plus(3)
    assert {k: tuple(v.shape) for k, v in values(learner).items() if k.startswith("rates")} == {
        f"rates.{k}": (3,)
        for k in (*(f"body.blocks.{i}.conv.weight" for i in range(4)), "head.weight", "head.bias")
    }
    assert isinstance(learner.later_norms, nn.ParameterDict)
    assert {tuple(v.shape) for v in learner.later_norms.values()} == {(2, 6)}
