"""Inner rules against torch.optim, and their meta-gradients against finite differences."""

import pytest
import torch

from pipeline.inner import SGD, Adagrad, Adam, RMSprop, Rule, descend, inner_step

RULES = [
    (SGD(), torch.optim.SGD, {}),
    (SGD(momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
    (SGD(momentum=0.8, nesterov=True), torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    (Adagrad(), torch.optim.Adagrad, {}),
    (Adagrad(eps=1e-2), torch.optim.Adagrad, {"eps": 1e-2}),
    (RMSprop(), torch.optim.RMSprop, {}),
    (RMSprop(alpha=0.5, eps=1e-3), torch.optim.RMSprop, {"alpha": 0.5, "eps": 1e-3}),
    (Adam(), torch.optim.Adam, {}),
    (Adam(beta1=0.0, beta2=0.9, eps=1e-4), torch.optim.Adam, {"betas": (0.0, 0.9), "eps": 1e-4}),
]
IDS = [f"{rule}" for rule, _, _ in RULES]
GENERATOR = torch.Generator().manual_seed(0)
MATRIX = torch.randn(5, 4, generator=GENERATOR, dtype=torch.float64)
TARGET = torch.randn(5, generator=GENERATOR, dtype=torch.float64)


def loss(p):
    """Not quadratic, and without effect on the last weight."""
    hidden = MATRIX @ torch.cat([p["w"][:3], p["b"]])
    return (hidden.tanh() - TARGET).square().sum()


def start() -> dict[str, torch.Tensor]:
    return {
        "w": torch.tensor([0.3, -0.2, 0.5, 1.0], dtype=torch.float64),
        "b": torch.tensor([0.1], dtype=torch.float64),
    }


@pytest.mark.parametrize(("rule", "optimizer", "options"), RULES, ids=IDS)
def test_every_step_is_that_of_torch_optim(rule: Rule, optimizer, options):
    theirs = {k: v.clone().requires_grad_() for k, v in start().items()}
    steps = optimizer(list(theirs.values()), lr=0.05, **options)
    ours, state = start(), {}
    for t in range(6):
        steps.zero_grad()
        loss(theirs).backward()
        steps.step()
        ours, state = inner_step(loss, ours, rule, 0.05, state, t, first_order=False)
        for k in ours:
            torch.testing.assert_close(ours[k], theirs[k].detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", [rule for rule, _, _ in RULES], ids=IDS)
def test_the_meta_gradient_is_that_of_finite_differences(rule: Rule):
    rates = {"w": torch.full((4,), 0.05).double(), "b": torch.full((1,), 0.02).double()}

    def outer(w, b, rate):
        phi = descend(loss, {"w": w, "b": b}, rule, rates | {"w": rate}, 3, first_order=False)
        return (phi["w"] * TARGET[:4]).sum() + phi["b"].square().sum()

    inputs = [v.requires_grad_() for v in (*start().values(), rates["w"].clone())]
    assert torch.autograd.gradcheck(outer, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_first_order_leaves_the_gradient_of_the_rates():
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    phi = descend(lambda p: p["w"] ** 2, {"w": w}, SGD(), {"w": rate}, 1, first_order=True)
    by_rate, by_w = torch.autograd.grad(phi["w"], [rate, w])
    assert (by_rate.item(), by_w.item()) == (-4.0, 1.0)  # phi = w - rate * 2w, 2w a constant
