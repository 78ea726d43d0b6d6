"""Meta-SGD. Li, Zhou, Chen, Li 2017, https://arxiv.org/abs/1707.09835."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.annotations import NonNegativeInt, PositiveFloat, Ways
from pipeline.engine import Engine
from pipeline.functional import Loss, Params
from pipeline.inner import PLAIN_DESCENT, Rule, descend
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.gradient import Adapted, GradientLearner, below, parameter_dict


class MetaSgd(GradientLearner):
    """MAML that learns a rate for each parameter as well: phi = theta - alpha * gradient, eq. 2.

    alpha has the shape of theta and may turn negative: it is a direction as much as a length.

    Args:
        inner_lr: where all entries of alpha start; [low, high]: at one number drawn from there,
            as in the paper (section 4.1: from 0.005 to 0.1).
        first_order: leave out second derivatives.
        inner_rule: what turns an inner gradient into a step; the paper has plain descent.
        The rest: see `GradientLearner`.
    """

    label = "Meta-SGD"

    def __init__(
        self,
        backbone: nn.Module,
        n_way: Ways,
        inner_lr: PositiveFloat | tuple[PositiveFloat, PositiveFloat],
        inner_steps: NonNegativeInt,
        eval_inner_steps: NonNegativeInt,
        first_order: bool,
        adapted: Adapted,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        engine: Engine = "auto",
        loss: Loss = "cross_entropy",
        inner_rule: Rule = PLAIN_DESCENT,
    ) -> None:
        super().__init__(
            backbone, n_way, inner_steps, eval_inner_steps, adapted, optimizer, scheduler, engine,
            loss,
        )  # fmt: skip
        self.first_order, self.inner_rule = first_order, inner_rule
        if not isinstance(inner_lr, float | int):
            inner_lr = float(torch.empty(()).uniform_(*inner_lr))
        phi = self.bind(self.theta()).phi
        self.rates = parameter_dict({k: torch.full_like(v, inner_lr) for k, v in phi.items()})

    def inner_loop(
        self, loss: Callable[[Params], Tensor], phi: Params, meta: Params, steps: int
    ) -> Params:
        """`steps` steps at the learned rates."""
        return descend(loss, phi, self.inner_rule, below(meta, "rates"), steps, self.first_order)
