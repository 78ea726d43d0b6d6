"""iMAML. Rajeswaran, Finn, Kakade, Levine 2019, https://arxiv.org/abs/1909.04630."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.annotations import NonNegativeInt, PositiveFloat, PositiveInt, Ways
from pipeline.blocks import BatchStatsNorm
from pipeline.engine import Engine
from pipeline.episode import Episode
from pipeline.functional import Loss, Params, conjugate_gradient, gradient, hessian, score
from pipeline.inner import PLAIN_DESCENT, Rule, descend
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.gradient import Gradient, GradientLearner


class Imaml(GradientLearner):
    """Learn parameters near which a regularised learner solves a new task.

    phi minimises loss + lambda/2 ||phi - theta||^2 on the support set (eq. 3). The meta-gradient
    follows from where that minimum is, whatever led there: (I + H/lambda)^-1 d query loss / d phi,
    with H the Hessian of the support loss at phi (eq. 6). Memory does not grow with the steps.

    TorchOpt 0.7.3 has it (and installs), but by functions that torch has deprecated, and its solver
    reads values in Python, so tasks cannot be stacked.

    Args:
        regularization: lambda.
        inner_steps: enough to come near the minimum; the meta-gradient supposes it.
        cg_steps: products with H that the linear system is solved in (Algorithm 2).
        inner_rule: what turns an inner gradient into a step.
        The rest: see `GradientLearner`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        n_way: Ways,
        inner_lr: PositiveFloat,
        inner_steps: NonNegativeInt,
        eval_inner_steps: NonNegativeInt,
        regularization: PositiveFloat,
        cg_steps: PositiveInt,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        engine: Engine = "auto",
        loss: Loss = "cross_entropy",
        inner_rule: Rule = PLAIN_DESCENT,
    ) -> None:
        super().__init__(
            backbone, n_way, inner_steps, eval_inner_steps, "all", optimizer, scheduler, engine,
            loss,
        )  # fmt: skip
        for part in backbone.modules():
            if isinstance(part, BatchStatsNorm):
                part.fused = False  # the fused one has no second derivative for `hessian` in a vmap
        self.inner_lr, self.inner_rule = inner_lr, inner_rule
        self.regularization, self.cg_steps = regularization, cg_steps

    @property
    def label(self) -> str:
        """As the paper writes it."""
        return "iMAML"

    def inner_loop(
        self, loss: Callable[[Params], Tensor], phi: Params, meta: Params, steps: int
    ) -> Params:
        """`steps` steps on the regularised support loss, of which no graph is kept."""
        theta = {k: v.detach() for k, v in phi.items()}

        def regularized(p: Params) -> Tensor:
            distance = torch.stack([(v - theta[k]).square().sum() for k, v in p.items()]).sum()
            return loss(p) + self.regularization / 2 * distance

        return descend(regularized, theta, self.inner_rule, self.inner_lr, steps, first_order=True)

    def task_gradient(self, theta: Params, task: Episode) -> Gradient:
        """The implicit meta-gradient at what the inner loop arrived at."""
        start, meta, _, predict = self.bind(theta)

        def support_loss(p: Params) -> Tensor:
            return self.loss(predict(p, task.support_x), task.support_y).mean()

        def query_loss(p: Params) -> tuple[Tensor, Tensor]:
            logits = predict(p, task.query_x)
            return self.loss(logits, task.query_y).mean(), logits

        phi = self.inner_loop(support_loss, start, meta, self.inner_steps)
        grads, logits = gradient(query_loss, phi)
        curvature = hessian(support_loss, phi)

        def system(v: Params) -> Params:
            return {k: v[k] + h / self.regularization for k, h in curvature(v).items()}

        logits = logits.detach()
        solved = conjugate_gradient(system, grads, self.cg_steps)
        loss, acc = self.loss(logits, task.query_y).mean(), score(logits, task.query_y)
        return {f"net.{k}": g for k, g in solved.items()}, loss, acc
