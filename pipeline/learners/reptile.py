"""Reptile. Nichol, Achiam, Schulman 2018, https://arxiv.org/abs/1803.02999."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from pipeline.annotations import NonNegativeInt, PositiveInt, Ways
from pipeline.engine import Engine
from pipeline.episode import Episode
from pipeline.errors import UserError
from pipeline.functional import Loss, Params, gradient, score
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.gradient import Gradient, GradientLearner, below


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
        engine: Engine = "auto",
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__(
            backbone, n_way, inner_steps, eval_inner_steps, "all", optimizer, scheduler, engine,
            loss,
        )  # fmt: skip
        self.make_inner_optimizer, self.inner_batch_size = inner_optimizer, inner_batch_size
        try:
            tried = inner_optimizer([nn.Parameter(torch.zeros(1, 1))])
        except (TypeError, ValueError) as error:
            raise UserError(f"learner.inner_optimizer: {error}") from error
        if type(tried).__name__ in ("Adafactor", "LBFGS", "Muon"):  # they mix the elements
            self.engine = "loop"

    def inner_loop(
        self, loss: Callable[[Params], Tensor], phi: Params, meta: Params, steps: int
    ) -> Params:
        """`steps` steps of the inner optimiser, each on the whole support set."""
        return self._descend(phi, [()] * steps, lambda p: gradient(lambda q: (loss(q), ()), p)[0])

    def _inner_gradient(self, phi: Params, x: Tensor, y: Tensor) -> Params:
        return gradient(lambda p: (self.loss(self._predict(p, x), y).mean(), ()), phi)[0]

    def _predict(self, phi: Params, x: Tensor) -> Tensor:
        return functional_call(self.net, phi, (x,))

    def _descend(
        self,
        start: Params,
        batches: Iterable[tuple[Tensor, ...]],
        grads_of: Callable[..., Params],
    ) -> Params:
        phi = {k: v.detach().clone() for k, v in start.items()}
        optimizer: Optimizer = self.make_inner_optimizer(phi.values())  # type: ignore[arg-type]  # torch says lists, takes any iterable
        for batch in batches:
            for k, g in grads_of(phi, *batch).items():
                phi[k].grad = g
            optimizer.step()
        return {k: v.detach() for k, v in phi.items()}

    def _batches(self, m: int, episode: int) -> list[Tensor]:
        """Which of m support images make up each inner step, a function of the episode."""
        generator = torch.Generator().manual_seed(episode)
        size = min(self.inner_batch_size, m)
        epochs = -(-self.inner_steps * size // m)
        order = torch.cat([torch.randperm(m, generator=generator) for _ in range(epochs)])
        return list(order.split(size)[: self.inner_steps])

    def task_gradient(self, theta: Params, task: Episode) -> Gradient:
        """Theta - phi, with the query loss and score of phi (not used by the step)."""
        parts = self._batches(len(task.support_y), int(task.id))
        batches = [(task.support_x[p], task.support_y[p]) for p in parts]
        start = below(theta, "net")
        phi = self._descend(start, batches, self._inner_gradient)
        with torch.no_grad():
            logits = self._predict(phi, task.query_x)
            loss = self.loss(logits, task.query_y).mean()
        return _towards(start, phi), loss, score(logits, task.query_y)

    def stacked_gradient(self, theta: Params, batch: Episode) -> Gradient:
        """See `GradientLearner.stacked_gradient`.

        One optimiser descends all tasks at once, as most work element by element.
        """
        tasks, m = batch.support_y.shape
        start = below(theta, "net")
        stacked = {k: v.expand(tasks, *v.shape) for k, v in start.items()}
        each = torch.arange(tasks).unsqueeze(1)
        orders = [self._batches(m, int(i)) for i in batch.id]
        parts = [torch.stack(step) for step in zip(*orders, strict=True)]  # (tasks, size) each
        batches = [(batch.support_x[each, p], batch.support_y[each, p]) for p in parts]
        grads_of = torch.vmap(self._inner_gradient, randomness="different")
        phi = self._descend(stacked, batches, grads_of)
        with torch.no_grad():
            logits = torch.vmap(self._predict, randomness="different")(phi, batch.query_x)
            loss = self.loss(logits, batch.query_y).mean(1)
        return _towards(start, phi), loss, score(logits, batch.query_y)

    def compile_networks(self) -> None:
        """Refused: the inner loop is that of an optimiser."""
        raise UserError("compile: found true; Reptile is not compiled, set compile=false")

    def stacked_predict(self, batch: Episode) -> Tensor:
        """See `GradientLearner.stacked_predict`."""
        tasks = len(batch.query_y)
        theta = {k: v.expand(tasks, *v.shape) for k, v in self.net.named_parameters()}
        batches = [(batch.support_x, batch.support_y)] * self.eval_inner_steps
        grads_of = torch.vmap(self._inner_gradient, randomness="different")
        phi = self._descend(theta, batches, grads_of)
        return torch.vmap(self._predict, randomness="different")(phi, batch.query_x)


def _towards(start: Params, phi: Params) -> Params:
    """The gradient whose descent moves the network towards phi."""
    return {f"net.{k}": v - phi[k] for k, v in start.items()}
