"""GradientLearner: adaptation by gradient descent from learned parameters. Floor 3."""

from abc import abstractmethod
from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.annotations import NonNegativeInt, Ways
from pipeline.backbones import BatchStatsNorm
from pipeline.episode import Classifier, Episode
from pipeline.errors import UserError
from pipeline.functional import Params, accuracy, count_ways
from pipeline.learners.base import MetaLearner, OptimizerFactory, SchedulerFactory

Adapted = Literal["all", "head"]


class GradientLearner(MetaLearner):
    """A network with a linear head whose parameters theta are a good place to start from.

    Args:
        backbone: the body; without running statistics, which an inner loop would mix over tasks.
        n_way: outputs of the head; this learner scores tasks of exactly that many classes.
        inner_steps, eval_inner_steps: steps of adaptation in training and in evaluation.
        adapted: "all" parameters or only the "head" (ANIL).
    """

    def __init__(
        self,
        backbone: nn.Module,
        n_way: Ways,
        inner_steps: NonNegativeInt,
        eval_inner_steps: NonNegativeInt,
        adapted: Adapted,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules()):
            raise UserError(
                "backbone.norm: 'batch' keeps running statistics, which an inner loop would mix "
                "over tasks; allowed with this learner are batch_stats, group, none"
            )
        for part in backbone.modules():
            if isinstance(part, BatchStatsNorm):
                part.fused = True  # `meta_loss` loops over tasks
        self.n_way = n_way
        self.inner_steps, self.eval_inner_steps = inner_steps, eval_inner_steps
        self.adapted = adapted
        head = nn.Linear(backbone.out_dim, n_way)  # type: ignore[arg-type]  # backbones have it
        self.net = nn.Sequential(OrderedDict(body=backbone, head=head))

    @abstractmethod
    def inner_loop(self, phi: Params, x: Tensor, y: Tensor, steps: int) -> Params:
        """Adapt phi to one support set; x is what `_predict` takes."""

    def _part(self, name: str) -> nn.Module:
        return self.net.get_submodule(name)

    def _predict(self, phi: Params, x: Tensor) -> Tensor:
        """Logits by the adapted part: of images, or of features where only the head adapts."""
        return functional_call(self.net if self.adapted == "all" else self._part("head"), phi, (x,))

    def inner_loss(self, phi: Params, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy on the support set, what the inner loop descends."""
        return F.cross_entropy(self._predict(phi, x), y)

    def adapt_from(
        self, theta: Params, support_x: Tensor, support_y: Tensor, steps: int
    ) -> Classifier:
        """`adapt` as a function of theta; whether it is differentiable is up to `inner_loop`."""
        if self.adapted == "all":
            phi = self.inner_loop(theta, support_x, support_y, steps)
            return lambda query_x: self._predict(phi, query_x)
        body = {k.removeprefix("body."): v for k, v in theta.items() if k.startswith("body.")}
        head = {k.removeprefix("head."): v for k, v in theta.items() if k.startswith("head.")}
        features = functional_call(self._part("body"), body, (support_x,))  # once for all steps
        phi = self.inner_loop(head, features, support_y, steps)
        return lambda query_x: self._predict(
            phi, functional_call(self._part("body"), body, (query_x,))
        )

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Classifier:
        """See `MetaLearner.adapt`; `eval_inner_steps` steps from theta.

        Raises:
            ValueError: also if the support set has another number of classes than the head.
        """
        if (found := count_ways(support_y)) != self.n_way:
            raise ValueError(
                f"n_way: {found} classes, but the head of this learner was trained for "
                f"{self.n_way}; an embedding learner (protonet) takes any number"
            )
        theta = {k: v.detach() for k, v in self.net.named_parameters()}
        return self.adapt_from(theta, support_x, support_y, self.eval_inner_steps)

    def meta_gradient(self, theta: Params, task: Episode) -> tuple[Params, Tensor, Tensor]:
        """Gradient of one task with respect to theta, its query loss and its query accuracy."""

        def query_loss(theta: Params) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            classify = self.adapt_from(theta, task.support_x, task.support_y, self.inner_steps)
            logits = classify(task.query_x)
            loss = F.cross_entropy(logits, task.query_y)
            return loss, (loss.detach(), accuracy(logits, task.query_y))

        gradient, (loss, acc) = torch.func.grad(query_loss, has_aux=True)(theta)
        return gradient, loss, acc

    def meta_loss(self, batch: Episode) -> tuple[Tensor, Tensor, Tensor]:
        """Accumulates the meta-gradient task by task: memory does not grow with the meta-batch.

        The tensor to differentiate is <theta, stop_grad(g)>, whose gradient is g; so automatic
        optimisation, clipping and DDP see an ordinary loss.
        """
        theta = dict(self.net.named_parameters())
        point = {k: v.detach() for k, v in theta.items()}
        total = {k: torch.zeros_like(v) for k, v in point.items()}
        losses, accuracies = [], []
        tasks = batch.tasks()
        for task in tasks:
            gradient, loss, acc = self.meta_gradient(point, task)
            for k, g in gradient.items():
                total[k] += g / len(tasks)
            losses.append(loss)
            accuracies.append(acc)
        surrogate = torch.stack([(v * total[k]).sum() for k, v in theta.items()]).sum()
        return surrogate, torch.stack(losses).mean(), torch.stack(accuracies).mean()
