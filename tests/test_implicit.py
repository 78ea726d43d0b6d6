"""iMAML, the LSTM meta-learner and LEO against closed forms, recurrences and finite differences."""

from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from pipeline.backbones import Conv4
from pipeline.blocks import BatchStatsNorm
from pipeline.episode import Episode
from pipeline.functional import conjugate_gradient, gradient, hessian
from pipeline.inner import SGD
from pipeline.learners.imaml import Imaml
from pipeline.learners.leo import Leo, correlation, kl_divergence
from pipeline.learners.lstm_learner import LstmLearner, lstm_cell, preprocess
from pipeline.learners.maml import Maml
from tests.test_gradients import meta_batch, meta_gradient, task

ADAM = partial(torch.optim.Adam, lr=1e-3)
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def body(kind: str) -> nn.Module:
    """A network of images of 20x20: Conv4 of some norm, or a smooth one, its minima without kinks."""
    if kind in ("batch_stats", "group"):
        return Conv4(1, 20, 4, kind, "stride")
    norm = BatchStatsNorm(6) if kind == "smooth with norm" else nn.Identity()
    parts = {
        "pool": nn.AvgPool2d(4, divisor_override=4),
        "flat": nn.Flatten(),
        "layer": nn.Linear(25, 6),
    }
    net = nn.Sequential(OrderedDict(**parts, norm=norm, tanh=nn.Tanh()))
    net.out_dim = 6
    return net


def slope(value, theta: dict[str, torch.Tensor], along: dict[str, torch.Tensor], h=1e-6) -> float:
    """Central difference of a function of named parameters."""
    ahead, behind = (value({k: v + t * along[k] for k, v in theta.items()}) for t in (h, -h))
    return (ahead - behind).item() / (2 * h)


def directions(like: dict[str, torch.Tensor], number: int):
    for seed in range(number):
        yield {k: seeded(*v.shape, seed=100 * seed + i) for i, (k, v) in enumerate(like.items())}


def inner(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((v * b[k]).sum()) for k, v in a.items())


# --- conjugate gradient and Hessian ---------------------------------------------------------------


def split(v: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"a": v[:4].reshape(2, 2), "b": v[4:]}


def joined(p: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([p["a"].flatten(), p["b"]])


def test_conjugate_gradient_solves_and_then_stays():
    half = seeded(7, 7)
    a, b = half @ half.T + torch.eye(7), seeded(7, seed=1)
    solution = torch.linalg.solve(a, b)
    errors = []
    for steps in (1, 3, 5, 7, 12, 40):
        x = joined(conjugate_gradient(lambda v: split(a @ joined(v)), split(b), steps))
        errors.append(float((x - solution) @ a @ (x - solution)))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    torch.testing.assert_close(x, solution, rtol=1e-9, atol=1e-12)
    zero = conjugate_gradient(lambda v: v, split(torch.zeros(7)), 3)
    assert not joined(zero).any()


def test_conjugate_gradient_is_best_in_its_subspace():
    """After k steps the error is the least, in the norm of A, that b, Ab, ... A^(k-1)b allow."""
    half = seeded(7, 7)
    a, b = half @ half.T + torch.eye(7), seeded(7, seed=1)
    krylov = torch.stack([torch.linalg.matrix_power(a, i) @ b for i in range(3)], 1)
    q = torch.linalg.qr(krylov).Q
    best = q @ torch.linalg.solve(q.T @ a @ q, q.T @ b)
    x = joined(conjugate_gradient(lambda v: split(a @ joined(v)), split(b), 3))
    torch.testing.assert_close(x, best, rtol=1e-9, atol=1e-12)


def test_conjugate_gradient_ends_where_the_matrix_is_not_positive():
    a, b = torch.diag(torch.tensor([3.0, 2, 1, 1, 1, 1, -1])).double(), torch.ones(7).double()
    # x = b b'b / b'Ab; the second direction, (-42, 14, 70, 70, 70, 70, 182) / 64, has p'Ap < 0
    for steps in (1, 2, 9):
        x = joined(conjugate_gradient(lambda v: split(a @ joined(v)), split(b), steps))
        torch.testing.assert_close(x, b * (7 / 8), **EXACT)
    assert not joined(conjugate_gradient(lambda v: split(-joined(v)), split(b), 3)).any()


def test_conjugate_gradient_may_be_stacked():
    half, b = seeded(3, 7, 7), seeded(3, 7, seed=1)
    b[2] = 0  # one is done before it begins
    a = half @ half.mT + torch.eye(7).double()
    solve = lambda a, b: joined(conjugate_gradient(lambda v: split(a @ joined(v)), split(b), 7))  # noqa: E731
    expected = torch.linalg.solve(a, b)
    torch.testing.assert_close(torch.vmap(solve)(a, b), expected, rtol=1e-8, atol=1e-10)


def test_hessian_products():
    matrix, v = seeded(5, 7), seeded(7, seed=3)
    function = lambda x: (matrix @ x).tanh().square().sum()  # noqa: E731
    point = seeded(7, seed=2)
    expected = torch.autograd.functional.hessian(function, point) @ v
    product = hessian(lambda p: function(joined(p)), split(point))
    torch.testing.assert_close(joined(product(split(v))), expected, **EXACT)
    torch.testing.assert_close(joined(product(split(2 * v))), 2 * expected, **EXACT)


@pytest.mark.parametrize("kind", ["batch_stats", "group"])
def test_hessian_products_of_a_network_against_differences_of_its_gradient(kind):
    torch.manual_seed(0)
    net, episode = body(kind).double(), task()
    at = {k: v.detach() for k, v in net.named_parameters()}
    (v,) = directions(at, 1)
    loss = lambda p: functional_call(net, p, (episode.support_x,)).pow(3).mean()  # noqa: E731
    ahead, behind = (
        gradient(lambda p: (loss(p), ()), {k: x + h * v[k] for k, x in at.items()})[0]
        for h in (1e-6, -1e-6)
    )
    for k, product in hessian(loss, at)(v).items():
        torch.testing.assert_close(product, (ahead[k] - behind[k]) / 2e-6, rtol=1e-5, atol=1e-6)


# --- iMAML ----------------------------------------------------------------------------------------


LAMBDA = 10.0


def imaml(kind="smooth", steps=100, cg_steps=40, engine="loop", net=None, **options) -> Imaml:
    torch.manual_seed(0)
    return Imaml(
        net or body(kind), 3, 0.03, steps, steps, LAMBDA, cg_steps, ADAM, None, engine, **options
    ).double()  # fmt: skip


def pixels() -> nn.Module:
    net = nn.Sequential(nn.AvgPool2d(5), nn.Flatten())
    net.out_dim = 16
    return net


def test_imaml_of_a_linear_model_in_closed_form():
    """Squared error: phi* = (A + lambda)^-1 (X'Y c + lambda theta), d phi*/d theta as it stands."""
    learner, lam = imaml(net=pixels(), loss="mse", cg_steps=17), LAMBDA
    episode = task()
    design = lambda x: torch.cat([pixels()(x), torch.ones(len(x), 1)], 1).double()  # noqa: E731
    x, q = design(episode.support_x), design(episode.query_x)
    y, t = (F.one_hot(v, 3).double() for v in (episode.support_y, episode.query_y))
    head = learner.net.head
    theta = torch.cat([head.weight, head.bias.unsqueeze(1)], 1).detach().T  # (17, 3)
    c, eye = 2 / y.numel(), torch.eye(17).double()
    system = c * x.T @ x + lam * eye
    phi = torch.linalg.solve(system, c * x.T @ y + lam * theta)

    logits = learner.adapt(episode.support_x, episode.support_y)(episode.query_x)
    torch.testing.assert_close(logits, q @ phi, rtol=1e-8, atol=1e-10)

    expected = lam * torch.linalg.solve(system, 2 / t.numel() * q.T @ (q @ phi - t))
    gradient = meta_gradient(learner, meta_batch(0))
    torch.testing.assert_close(gradient["head.weight"], expected[:16].T, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(gradient["head.bias"], expected[16], rtol=1e-7, atol=1e-10)


def solved(net: nn.Module, theta: dict[str, torch.Tensor], episode: Episode) -> torch.Tensor:
    """Query loss at the regularised minimum, by plain autograd."""
    phi = {k: v.clone() for k, v in theta.items()}
    for _ in range(100):
        phi = {k: v.detach().requires_grad_() for k, v in phi.items()}
        logits = functional_call(net, phi, (episode.support_x,))
        far = sum((v - theta[k]).square().sum() for k, v in phi.items())
        loss = F.cross_entropy(logits, episode.support_y) + LAMBDA / 2 * far
        steps = torch.autograd.grad(loss, list(phi.values()))
        phi = {k: (v - 0.03 * g).detach() for (k, v), g in zip(phi.items(), steps, strict=True)}
    assert max(float(g.abs().max()) for g in steps) < 1e-9
    return F.cross_entropy(functional_call(net, phi, (episode.query_x,)), episode.query_y)


@pytest.mark.parametrize("kind", ["smooth", "smooth with norm"])
def test_imaml_against_finite_differences_of_the_solved_inner_problem(kind):
    learner, episode = imaml(kind), task()
    gradient = meta_gradient(learner, meta_batch(0))
    theta = {k: v.detach() for k, v in learner.net.named_parameters()}
    for along in directions(theta, 2):
        expected = slope(lambda t: solved(learner.net, t, episode), theta, along)
        assert inner(gradient, along) == pytest.approx(expected, rel=1e-5)
    few = meta_gradient(imaml(kind, cg_steps=1), meta_batch(0))
    assert inner(few, along) != pytest.approx(expected, rel=1e-3)


def test_any_inner_rule_comes_to_the_same_minimum():
    episode = task()
    plain, fast = imaml(), imaml(inner_rule=SGD(momentum=0.3))
    a, b = (m.adapt(episode.support_x, episode.support_y)(episode.query_x) for m in (plain, fast))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# --- the LSTM meta-learner ------------------------------------------------------------------------


def lstm_learner(kind="smooth", steps=3, engine="loop", seed=0):
    torch.manual_seed(seed)
    learner = LstmLearner(body(kind), 3, 5, steps, steps, ADAM, None, engine).double()
    with torch.no_grad():  # gates that depend on what they see
        for name, p in learner.named_parameters():
            if not name.startswith("net."):
                p += 0.5 * seeded(*p.shape, seed=len(name))
    return learner


def test_preprocessing_by_hand():
    x = torch.tensor([[1.0], [-np.e], [np.exp(-10)], [-np.exp(-11)], [0.0]], dtype=torch.float64)
    expected = [[0, 1], [0.1, -1], [-1, 1], [-1, -np.exp(-1)], [-1, 0]]
    torch.testing.assert_close(preprocess(x), torch.tensor(expected).double(), **EXACT)


def test_the_first_layer_is_that_of_torch():
    torch.manual_seed(0)
    cell = nn.LSTMCell(4, 5).double()
    x, h, c = seeded(6, 4), seeded(6, 5, seed=1), seeded(6, 5, seed=2)
    ours = lstm_cell({k: v.detach() for k, v in cell.named_parameters()}, x, h, c)
    for a, b in zip(ours, cell(x, (h, c)), strict=True):
        torch.testing.assert_close(a, b.detach(), **EXACT)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def recurrence(learner: LstmLearner, gradients, losses) -> np.ndarray:
    """The paper's section 3 in NumPy, of all parameters of the network in a row.

    Args:
        gradients, losses: functions of the parameters and the number of the step.
    """
    w = {k: v.detach().numpy() for k, v in learner.named_parameters()}
    cell = np.concatenate([v.ravel() for k, v in w.items() if k.startswith("net.")])
    n, hidden = len(cell), w["lstm.weight_hh"].shape[1]
    h, c, forget, rate = np.zeros((n, hidden)), np.zeros((n, hidden)), np.zeros(n), np.zeros(n)

    def prepared(x):
        big = np.abs(x) >= np.exp(-10)
        safe = np.where(big, np.abs(x), 1.0)
        return np.where(big, np.log(safe) / 10, -1), np.where(big, np.sign(x), np.exp(10) * x)

    for step in range(learner.inner_steps):
        gradient, loss = gradients(cell, step), np.full(n, losses(cell, step))
        x = np.stack([*prepared(gradient), *prepared(loss)], 1)
        gates = x @ w["lstm.weight_ih"].T + w["lstm.bias_ih"]
        gates = gates + h @ w["lstm.weight_hh"].T + w["lstm.bias_hh"]
        i, f, g, o = np.split(gates, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        wf, wi = w["forget_gate.weight"][0], w["input_gate.weight"][0]
        forget = h @ wf[:-2] + cell * wf[-2] + forget * wf[-1] + w["forget_gate.bias"]
        rate = h @ wi[:-2] + cell * wi[-2] + rate * wi[-1] + w["input_gate.bias"]
        forget, rate = sigmoid(forget), sigmoid(rate)
        cell = forget * cell - rate * gradient
    return cell


def at_cell(learner: LstmLearner, cell: np.ndarray) -> dict[str, torch.Tensor]:
    shapes = {k: v.shape for k, v in learner.net.named_parameters()}
    parts = torch.from_numpy(cell).split([s.numel() for s in shapes.values()])
    return {k: p.reshape(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}


def support_gradient(learner: LstmLearner, cell: np.ndarray, episode: Episode):
    phi = {k: v.requires_grad_() for k, v in at_cell(learner, cell.copy()).items()}
    logits = functional_call(learner.net, phi, (episode.support_x,))
    loss = F.cross_entropy(logits, episode.support_y)
    parts = torch.autograd.grad(loss, list(phi.values()))
    return np.concatenate([g.numpy().ravel() for g in parts]), loss.item()


def test_the_lstm_meta_learner_is_its_recurrence_and_its_gradient_that_of_frozen_gradients():
    learner, episode = lstm_learner(), task()
    live = lambda part: lambda cell, step: support_gradient(learner, cell, episode)[part]  # noqa: E731
    frozen: list[tuple[np.ndarray, float]] = []

    def remember(cell, step):
        frozen.append(support_gradient(learner, cell, episode))
        return frozen[-1][0]

    cell = recurrence(learner, remember, live(1))
    logits = functional_call(learner.net, at_cell(learner, cell), (episode.query_x,)).detach()
    ours = learner.adapt(episode.support_x, episode.support_y)(episode.query_x)
    torch.testing.assert_close(ours, logits, **EXACT)

    learner.meta_loss(meta_batch(0))[0].backward()
    gradient = {k: p.grad for k, p in learner.named_parameters()}
    theta = {k: v.detach().clone() for k, v in learner.named_parameters()}

    def query_loss(moved):
        learner.load_state_dict(moved, strict=False)
        end = recurrence(learner, lambda _, t: frozen[t][0], lambda _, t: frozen[t][1])
        at = functional_call(learner.net, at_cell(learner, end), (episode.query_x,))
        return F.cross_entropy(at, episode.query_y)

    groups = [{k: v for k, v in theta.items() if k.startswith(g)} for g in ("net", "lstm", "forget", "input")]  # fmt: skip
    for group in groups:
        (along,) = directions(group, 1)
        along = {k: along.get(k, torch.zeros_like(v)) for k, v in theta.items()}
        with torch.no_grad():
            expected = slope(query_loss, theta, along)
        assert inner(gradient, along) == pytest.approx(expected, rel=2e-6)


def test_with_constant_gates_it_is_first_order_maml():
    rate, learner = 0.3, lstm_learner("batch_stats")
    with torch.no_grad():
        for gate in (learner.forget_gate, learner.input_gate):
            gate.weight.zero_()
        learner.forget_gate.bias.fill_(60.0)  # a sigmoid of one
        learner.input_gate.bias.fill_(np.log(rate / (1 - rate)))
    maml = Maml(body("batch_stats"), 3, rate, 3, 3, True, "all", ADAM, None, "loop").double()
    maml.net.load_state_dict(learner.net.state_dict())
    batch = meta_batch(0, 1)
    ours, theirs = meta_gradient(learner, batch), meta_gradient(maml, batch)
    for k, g in theirs.items():
        torch.testing.assert_close(ours[k], g, **EXACT)
    torch.testing.assert_close(learner.predict(batch), maml.predict(batch), **EXACT)


def test_it_begins_as_gradient_descent_in_small_steps():
    torch.manual_seed(0)
    learner = LstmLearner(body("smooth"), 3, 20, 2, 2, ADAM, None)
    assert 0.98 < learner.forget_gate.bias.sigmoid().item() < 1
    assert 0.006 < learner.input_gate.bias.sigmoid().item() < 0.02


# --- both, in every engine ------------------------------------------------------------------------


def build(name: str, kind: str, engine: str):
    if name == "imaml":
        return imaml(kind, steps=2, cg_steps=2, engine=engine)
    return lstm_learner(kind, steps=2, engine=engine)


@pytest.mark.parametrize("kind", ["batch_stats", "group"])
@pytest.mark.parametrize("name", ["imaml", "lstm"])
def test_loop_threads_and_vmap_are_one_function(name, kind):
    batch, results = meta_batch(0, 1), []
    for engine, threads in (("loop", 1), ("loop", 2), ("vmap", 1)):
        if threads == 2 and kind == "group":
            continue
        torch.set_num_threads(threads)
        try:
            learner = build(name, kind, engine)
            value, loss, acc = learner.meta_loss(batch)
            value.backward()
            found = {k: p.grad for k, p in learner.named_parameters()}
            with torch.inference_mode():
                logits = learner.eval().predict(batch)
            results.append(found | {"loss": loss, "acc": acc.double(), "logits": logits})
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        for k, v in results[0].items():
            torch.testing.assert_close(other[k], v, **EXACT)


# --- LEO ------------------------------------------------------------------------------------------


def leo(inner_steps=2, finetuning_steps=1, kind="smooth", **weights) -> Leo:
    torch.manual_seed(0)
    options = {"kl_weight": 0.1, "encoder_weight": 0.3, "orthogonality_weight": 0.2} | weights
    return Leo(
        body(kind), 4, inner_steps, 0.5, finetuning_steps, 0.1, optimizer=ADAM, scheduler=None,
        **options,
    ).double()  # fmt: skip


def test_kl_divergence_is_that_of_torch():
    mean, std = seeded(3, 4), seeded(3, 4, seed=1).exp()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(0, 1)).mean()
    torch.testing.assert_close(kl_divergence(mean, std), expected, **EXACT)


def test_orthogonality_by_hand():
    # cosine of the two rows: (3*4 + 4*3) / 25 = 24/25, twice among four
    rows = torch.tensor([[3.0, 4.0], [8.0, 6.0]], dtype=torch.float64)
    assert correlation(rows).item() == pytest.approx(2 * 0.96**2 / 4)
    assert correlation(torch.diag(torch.tensor([2.0, 5.0, 0.1]))).item() == pytest.approx(0)


def test_the_code_of_a_class_is_the_mean_over_pairs():
    """Eq. 4, pair by pair; classes of 1, 2 and 3 images."""
    learner, z, y = leo(), seeded(6, 6), torch.tensor([2, 0, 2, 1, 2, 1])
    mean, std = learner.encode(z, y, 3)
    ours = torch.cat([mean, (2**std - 1).log()], 1)  # log2(1 + e^x) = std
    e = learner.encoder(z)
    for c in range(3):
        pairs = [torch.cat([e[i], e[j]]) for i in range(6) if y[i] == c for j in range(6)]
        torch.testing.assert_close(ours[c], torch.stack([learner.relation(p) for p in pairs]).mean(0), **EXACT)  # fmt: skip


def test_an_inner_step_follows_the_slope_of_the_support_loss():
    learner, z, y = leo(1, 0), seeded(6, 6), torch.arange(3).repeat(2)
    found = learner.solve(z, y, 3)
    weight = learner.decoder.weight.detach()[:6]  # of the means

    @torch.no_grad()
    def loss(p):
        return 3 * F.cross_entropy(z @ (p["code"] @ weight.T).T, y)

    start = found.mean.detach()
    gradient = torch.zeros_like(start)
    for i in range(start.numel()):
        along = torch.zeros_like(start)
        along.view(-1)[i] = 1
        gradient.view(-1)[i] = slope(loss, {"code": start}, {"code": along})
    torch.testing.assert_close(found.end, start - 0.5 * gradient, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.weights, found.end @ weight.T, **EXACT)


def objective(learner: Leo, batch: Episode, noise) -> torch.Tensor:
    """Eq. 6 and 7 task by task, second derivatives by autograd on named tensors."""
    total = []
    normal = torch.distributions.Normal
    for i, t in enumerate(batch.tasks()):
        z, q = (learner.backbone(x) for x in (t.support_x, t.query_x))
        z, q = z / z.norm(dim=1, keepdim=True), q / q.norm(dim=1, keepdim=True)
        mean, std = learner.encode(z, t.support_y, 3)
        code = start = mean + std * noise[0][i]

        def weights(code, i=i):
            m, s = learner.decoder(code).chunk(2, 1)
            return m + np.sqrt(2 / (6 + 3)) * torch.log2(1 + s.exp()) * noise[1][i]

        for _ in range(learner.inner_steps):
            loss = 3 * F.cross_entropy(z @ weights(code).T, t.support_y)
            code = code - learner.inner_lr * torch.autograd.grad(loss, code, create_graph=True)[0]
        w = weights(code)
        for _ in range(learner.finetuning_steps):
            loss = 3 * F.cross_entropy(z @ w.T, t.support_y)
            w = w - learner.finetuning_lr * torch.autograd.grad(loss, w, create_graph=True)[0]
        kl = torch.distributions.kl_divergence(normal(mean, std), normal(0, 1)).mean()
        way = F.mse_loss(start, code.detach())
        total.append(F.cross_entropy(q @ w.T, t.query_y) + 0.1 * kl + 0.3 * way)
    rows = learner.decoder.weight.T / learner.decoder.weight.norm(dim=0).unsqueeze(1)
    return sum(total) / len(total) + 0.2 * (rows @ rows.T - torch.eye(4)).square().mean()


def test_the_objective_of_leo_and_its_gradient():
    """vmap with torch.func.grad inside against a loop of autograd, with the very noise."""
    learner, batch = leo(), meta_batch(0, 1)
    torch.manual_seed(5)
    value, loss, _ = learner.meta_loss(batch)
    torch.manual_seed(5)
    noise = [torch.randn(2, 3, n, dtype=torch.float64) for n in (4, 6)]
    expected = objective(learner, batch, noise)
    torch.testing.assert_close(value, expected, **EXACT)
    assert loss < value
    ours = torch.autograd.grad(value, list(learner.parameters()))
    theirs = torch.autograd.grad(expected, list(learner.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_the_gradient_of_leo_against_finite_differences():
    learner, batch = leo(encoder_weight=0.0), meta_batch(0, 1)  # whose stopped gradient has no such
    theta = {k: v.detach().clone() for k, v in learner.named_parameters()}

    def value(moved):
        learner.load_state_dict(moved, strict=False)
        torch.manual_seed(5)
        return learner.meta_loss(batch)[0]

    value(theta).backward()
    gradient = {k: p.grad for k, p in learner.named_parameters()}
    for along in directions(theta, 2):
        assert inner(gradient, along) == pytest.approx(slope(value, theta, along), rel=1e-6)


def test_evaluation_of_leo_takes_means_and_any_number_of_classes():
    learner, batch = leo().eval(), meta_batch(0, 1, 2)
    with torch.no_grad():
        once = learner.predict(batch)
        apart = [learner.adapt(t.support_x, t.support_y)(t.query_x) for t in batch.tasks()]
    torch.testing.assert_close(once, torch.stack(apart), **EXACT)
    assert learner.n_way is None
    for n_way in (2, 3, 7):
        z, y, q = seeded(3, 2 * n_way, 6), torch.arange(n_way).repeat(3, 2), seeded(3, 5, 6, seed=1)
        logits = learner.heads(z, y, q, n_way)
        assert logits.shape == (3, 5, n_way)
        turned = learner.heads(z, (y + 1) % n_way, q, n_way)  # classes named otherwise
        torch.testing.assert_close(turned.roll(-1, 2), logits, **EXACT)


def test_training_noise_of_leo_follows_the_seed():
    learner, batch = leo(), meta_batch(0, 1)
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(learner.meta_loss(batch)[0].item())
    assert values[0] == values[1] != values[2]
