"""Reptile. Nichol, Achiam, Schulman 2018, https://arxiv.org/abs/1803.02999."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.annotations import NonNegativeInt, PositiveInt, Ways
from pipeline.episode import Episode
from pipeline.errors import UserError
from pipeline.functional import Params, accuracy
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.gradient import GradientLearner


class Reptile(GradientLearner):
    """Move theta towards what ordinary training on each task arrives at.

    The Reptile step (algorithm 2) is theta <- theta + eps * mean(phi - theta): gradient descent at
    rate eps on 0.5 * ||theta - stop_grad(phi)||^2, so any outer optimiser takes theta - phi.

    Args:
        inner_optimizer: of torch.optim, fresh for each task; the paper has Adam with beta1 = 0.
        inner_batch_size: support images in an inner step of training; evaluation takes them all.
        The rest: see `GradientLearner`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        n_way: Ways,
        inner_optimizer: OptimizerFactory,
        inner_steps: PositiveInt,
        eval_inner_steps: NonNegativeInt,
        inner_batch_size: PositiveInt,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
    ) -> None:
        super().__init__(
            backbone, n_way, inner_steps, eval_inner_steps, "all", optimizer, scheduler
        )
        self.make_inner_optimizer, self.inner_batch_size = inner_optimizer, inner_batch_size
        try:
            inner_optimizer([nn.Parameter(torch.zeros(1))])
        except (TypeError, ValueError) as error:
            raise UserError(f"learner.inner_optimizer: {error}") from error

    def inner_loop(self, phi: Params, x: Tensor, y: Tensor, steps: int) -> Params:
        """`steps` steps of the inner optimiser, each on all of x."""
        return self._descend(phi, [(x, y)] * steps)

    def _descend(self, theta: Params, batches: Iterable[tuple[Tensor, Tensor]]) -> Params:
        phi = {k: v.detach().clone() for k, v in theta.items()}
        optimizer: Optimizer = self.make_inner_optimizer(phi.values())  # type: ignore[arg-type]  # any iterable
        for x, y in batches:
            gradient = torch.func.grad(self.inner_loss)(phi, x, y)
            for k, v in phi.items():
                v.grad = gradient[k]
            optimizer.step()
        return {k: v.detach() for k, v in phi.items()}

    def meta_gradient(self, theta: Params, task: Episode) -> tuple[Params, Tensor, Tensor]:
        """Theta - phi, with the query loss and accuracy of phi (not used by the step)."""
        m = len(task.support_y)
        epochs = -(-self.inner_steps * min(self.inner_batch_size, m) // m)
        order = torch.cat([torch.randperm(m) for _ in range(epochs)]).to(task.support_y.device)
        parts = order.split(min(self.inner_batch_size, m))[: self.inner_steps]
        phi = self._descend(theta, [(task.support_x[p], task.support_y[p]) for p in parts])
        with torch.no_grad():
            logits = self._predict(phi, task.query_x)
            loss = nn.functional.cross_entropy(logits, task.query_y)
        return {k: theta[k] - phi[k] for k in theta}, loss, accuracy(logits, task.query_y)
