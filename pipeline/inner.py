"""Inner loops: descent as a differentiable function of where it starts. Floor 0.

A rule is an optimiser of torch.optim as a pure function, equal to it step by step. torch.optim
writes in place, which cuts the graph; TorchOpt's differentiable ones need a compiled extension and
know one rate for all parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pipeline.annotations import Fraction, PositiveFloat, Probability
from pipeline.functional import Params, gradient

State = Mapping[str, Params]
"""What a rule remembers of earlier steps, by name; empty before the first."""
Rates = float | Params
"""One learning rate, or one for each parameter that broadcasts to it."""


@runtime_checkable
class Rule(Protocol):
    """How a gradient becomes a step."""

    def direction(self, grads: Params, state: State, t: int) -> tuple[Params, State]:
        """What a rate of one would subtract in step t = 0, 1, ..., and the new memory."""
        ...


@dataclass(frozen=True)
class SGD:
    """Gradient descent, with momentum if asked for: torch.optim.SGD."""

    momentum: Fraction = 0.0
    nesterov: bool = False

    def direction(self, grads: Params, state: State, t: int) -> tuple[Params, State]:
        """See `Rule.direction`."""
        if not self.momentum:
            return grads, {}
        old = state.get("velocity")
        velocity = {k: g + self.momentum * old[k] for k, g in grads.items()} if old else grads
        if not self.nesterov:
            return velocity, {"velocity": velocity}
        ahead = {k: g + self.momentum * velocity[k] for k, g in grads.items()}
        return ahead, {"velocity": velocity}


PLAIN_DESCENT = SGD()
"""What the papers' inner loops do."""


@dataclass(frozen=True)
class Adagrad:
    """Duchi, Hazan, Singer 2011: torch.optim.Adagrad."""

    eps: PositiveFloat = 1e-10

    def direction(self, grads: Params, state: State, t: int) -> tuple[Params, State]:
        """See `Rule.direction`."""
        total = _blend(state.get("total"), grads, 1.0, 1.0)
        return {k: g / (_root(total[k]) + self.eps) for k, g in grads.items()}, {"total": total}


@dataclass(frozen=True)
class RMSprop:
    """Tieleman, Hinton 2012: torch.optim.RMSprop."""

    alpha: Fraction = 0.99
    eps: PositiveFloat = 1e-8

    def direction(self, grads: Params, state: State, t: int) -> tuple[Params, State]:
        """See `Rule.direction`."""
        mean = _blend(state.get("mean"), grads, self.alpha, 1 - self.alpha)
        return {k: g / (_root(mean[k]) + self.eps) for k, g in grads.items()}, {"mean": mean}


@dataclass(frozen=True)
class Adam:
    """Kingma, Ba 2015: torch.optim.Adam."""

    beta1: Probability = 0.9
    beta2: Probability = 0.999
    eps: PositiveFloat = 1e-8

    def direction(self, grads: Params, state: State, t: int) -> tuple[Params, State]:
        """See `Rule.direction`."""
        old = state.get("first")
        first = {
            k: (self.beta1 * old[k] if old else 0) + (1 - self.beta1) * g for k, g in grads.items()
        }
        second = _blend(state.get("second"), grads, self.beta2, 1 - self.beta2)
        c1, c2 = 1 - self.beta1 ** (t + 1), 1 - self.beta2 ** (t + 1)
        step = {k: m / c1 / (_root(second[k]) / c2**0.5 + self.eps) for k, m in first.items()}
        return step, {"first": first, "second": second}


def _blend(old: Params | None, grads: Params, keep: float, add: float) -> Params:
    """Keep * old + add * grads^2."""
    return {k: (keep * old[k] if old else 0) + add * g * g for k, g in grads.items()}


def _root(x: Tensor) -> Tensor:
    """Square root with derivative 0 at 0, where a parameter had no gradient yet."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


def inner_step(
    loss: Callable[[Params], Tensor],
    phi: Params,
    rule: Rule,
    rates: Rates,
    state: State,
    t: int,
    first_order: bool,
    transform: Callable[[Params], Params] = lambda grads: grads,
) -> tuple[Params, State]:
    """Step t = 0, 1, ...: phi <- phi - rates * rule(transform(d loss / d phi)).

    Finn, Abbeel, Levine 2017, eq. 1, https://arxiv.org/abs/1703.03400, for any rule. The result is
    differentiable in phi, the rates and whatever else `loss` depends on. First order (their section
    5.2) takes the gradient at a detached point and as a constant, so that no second derivative is
    ever built; d phi' / d phi is then the identity.

    Args:
        transform: of the gradient, before the rule; may have learned parameters.

    Returns:
        Adapted parameters, same keys as phi, and what the rule remembers.
    """
    point = {k: v.detach() for k, v in phi.items()} if first_order else phi
    grads, _ = gradient(lambda p: (loss(p), ()), point)
    if first_order:
        grads = {k: g.detach() for k, g in grads.items()}
    step, state = rule.direction(transform(grads), state, t)
    if isinstance(rates, float | int):
        return {k: v - rates * step[k] for k, v in phi.items()}, state
    return {k: v - rates[k] * step[k] for k, v in phi.items()}, state


def descend(
    loss: Callable[[Params], Tensor],
    phi: Params,
    rule: Rule,
    rates: Rates,
    steps: int,
    first_order: bool,
    transform: Callable[[Params], Params] = lambda grads: grads,
) -> Params:
    """`steps` times `inner_step` at the same rates."""
    state: State = {}
    for t in range(steps):
        phi, state = inner_step(loss, phi, rule, rates, state, t, first_order, transform)
    return phi
