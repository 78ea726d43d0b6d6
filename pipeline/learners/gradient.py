"""GradientLearner: adaptation by gradient descent from learned parameters. Floor 3."""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.annotations import NonNegativeInt, Ways
from pipeline.backbones import out_dim
from pipeline.blocks import BatchStatsNorm
from pipeline.engine import ChunkSize, Engine, chunks, each_task, resolve
from pipeline.episode import Classifier, Episode
from pipeline.errors import UserError
from pipeline.functional import Loss, Params, count_ways, gradient, score
from pipeline.learners.base import MetaLearner, OptimizerFactory, SchedulerFactory

R = TypeVar("R")
Adapted = Literal["all", "head", "body"]
Gradient = tuple[Params, Tensor, Tensor]
"""Meta-gradient, query loss and query score."""


class Bound(NamedTuple):
    """The network at given meta-parameters, as functions of what the inner loop adapts.

    Attributes:
        phi: what is adapted, where it starts.
        meta: meta-parameters that are none of the network's: learned rates and the like.
        features: what all inner steps share, of images.
        predict: logits of features under adapted parameters.
    """

    phi: Params
    meta: Params
    features: Callable[[Tensor], Tensor]
    predict: Callable[[Params, Tensor], Tensor]


class InnerCurve(NamedTuple):
    """Means over tasks after each of some numbers of inner steps.

    Attributes:
        support_loss: what the inner loop descends.
        query_accuracy: in 0..1; of real targets the mean squared error.
    """

    support_loss: list[float]
    query_accuracy: list[float]


def below(params: Params, name: str) -> Params:
    """The entries of a module or `parameter_dict` of that name, without it."""
    at = f"{name}."
    return {k.removeprefix(at).replace("/", "."): v for k, v in params.items() if k.startswith(at)}


def parameter_dict(params: Params) -> nn.ParameterDict:
    """Parameters by the names of others, such as a rate for each; `below` reads them again."""
    return nn.ParameterDict({k.replace(".", "/"): v for k, v in params.items()})


class GradientLearner(MetaLearner):
    """A network with a linear head whose parameters are a good place to start from.

    The meta-parameters theta are all parameters of the learner by name: those of `net`, and what
    else it learns of adaptation (rates, say), which `inner_loop` is given as `meta`.

    Args:
        backbone: the body; without running statistics, which an inner loop would mix over tasks.
        n_way: outputs of the head; this learner scores tasks of exactly that many classes.
        inner_steps, eval_inner_steps: steps of adaptation in training and in evaluation.
        adapted: "all" parameters, only the "head" (ANIL) or only the "body" (BOIL).
        engine: how the tasks of a meta-batch are run; see `engine`.
    """

    regresses: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        n_way: Ways,
        inner_steps: NonNegativeInt,
        eval_inner_steps: NonNegativeInt,
        adapted: Adapted,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        engine: Engine = "auto",
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__(optimizer, scheduler, loss)
        self.engine, self._chunk_size, self._compiled = engine, ChunkSize(), False
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules()):
            raise UserError(
                "backbone.norm: 'batch' keeps running statistics, which an inner loop would mix "
                "over tasks; allowed with this learner are batch_stats, group, none"
            )
        for part in backbone.modules():
            if isinstance(part, BatchStatsNorm):
                part.fused = True  # every gradient is taken inside of vmap, or without it
        self.n_way: int = n_way
        self.inner_steps, self.eval_inner_steps = inner_steps, eval_inner_steps
        self.adapted = adapted
        head = nn.Linear(out_dim(backbone), n_way)
        self.net = nn.Sequential(OrderedDict(body=backbone, head=head))

    @abstractmethod
    def inner_loop(
        self, loss: Callable[[Params], Tensor], phi: Params, meta: Params, steps: int
    ) -> Params:
        """Adapt phi to one support set.

        Args:
            loss: on the support set, of phi.
            phi: where to start.
            meta: see `Bound`.
            steps: how many.
        """

    def theta(self) -> Params:
        """All meta-parameters, as constants."""
        return {k: v.detach() for k, v in self.named_parameters()}

    def bind(self, theta: Params) -> Bound:
        """The network at theta, cut into what is adapted and what is not."""
        net = below(theta, "net")
        meta = {k: v for k, v in theta.items() if not k.startswith("net.")}
        if self.adapted == "head":
            features = self._at("body", below(net, "body"))
            head = self.net.get_submodule("head")
            return Bound(
                below(net, "head"), meta, features, lambda p, z: functional_call(head, p, (z,))
            )
        fixed = {k: v for k, v in net.items() if self.adapted == "body" and k.startswith("head.")}
        phi = {k: v for k, v in net.items() if k not in fixed}
        return Bound(
            phi, meta, lambda x: x, lambda p, x: functional_call(self.net, p | fixed, (x,))
        )

    def _at(self, part: str, parameters: Params) -> Callable[[Tensor], Tensor]:
        module = self.net.get_submodule(part)
        return lambda x: functional_call(module, parameters, (x,))

    def adapt_from(
        self, theta: Params, support_x: Tensor, support_y: Tensor, steps: int
    ) -> Classifier:
        """`adapt` as a function of theta; whether it is differentiable is up to `inner_loop`."""
        start, meta, features, predict = self.bind(theta)
        z = features(support_x)  # once for all steps
        phi = self.inner_loop(
            lambda p: self.loss(predict(p, z), support_y).mean(), start, meta, steps
        )
        return lambda query_x: predict(phi, features(query_x))

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Classifier:
        """See `MetaLearner.adapt`; `eval_inner_steps` steps from theta.

        Raises:
            ValueError: also if the support set has another number of classes than the head.
        """
        return self.adapt_in(self.eval_inner_steps, support_x, support_y)

    def adapt_in(self, steps: int, support_x: Tensor, support_y: Tensor) -> Classifier:
        """`adapt` in another number of steps."""
        self.check_ways(count_ways(support_y))
        with torch.inference_mode(False):  # where `gradient` takes the slower way
            theta = self.theta()
            if support_x.is_inference():  # autograd does not save such tensors
                support_x, support_y = support_x.clone(), support_y.clone()
            return self.adapt_from(theta, support_x, support_y, steps)

    @torch.no_grad()
    def inner_curve(self, batch: Episode, steps: int | Sequence[int]) -> InnerCurve:
        """What the inner loop does to the tasks of a meta-batch, on average.

        Each number of steps starts from theta, as `inner_loop` gives its end alone.

        Args:
            steps: numbers of them, or the largest of 0, 1, ...
        """
        curve = InnerCurve([], [])
        for k in range(steps + 1) if isinstance(steps, int) else steps:
            adapted = [(self.adapt_in(k, t.support_x, t.support_y), t) for t in batch.tasks()]
            losses = [self.loss(c(t.support_x), t.support_y).mean() for c, t in adapted]
            accuracies = [score(c(t.query_x), t.query_y) for c, t in adapted]
            curve.support_loss.append(float(torch.stack(losses).mean()))
            curve.query_accuracy.append(float(torch.stack(accuracies).mean()))
        return curve

    def predict(self, batch: Episode) -> Tensor:
        """`adapt` to each task; on a GPU to a chunk of tasks at a time, which is the same."""
        own = type(self).adapt is not GradientLearner.adapt  # then only `adapt` knows
        if own or resolve(self.engine, batch.query_x.device) == "loop":

            def one(learner: "GradientLearner", task: Episode) -> Tensor:
                return learner.adapt(task.support_x, task.support_y)(task.query_x)

            return torch.stack(list(each_task(self, one, batch.tasks())))
        self.check_ways(batch.n_way)
        parts = self._chunks(batch, "predict", lambda part: self.stacked_predict(part))
        return torch.cat(list(parts))

    def stacked_predict(self, batch: Episode) -> Tensor:
        """`predict` with all tasks at once."""
        theta = self.theta()

        def one(support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
            return self.adapt_from(theta, support_x, support_y, self.eval_inner_steps)(query_x)

        return torch.vmap(one, randomness="different")(
            batch.support_x, batch.support_y, batch.query_x
        )

    def task_loss(self, theta: Params, task: Episode) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outer loss of one task as a function of theta, with query loss and score to report."""
        classify = self.adapt_from(theta, task.support_x, task.support_y, self.inner_steps)
        logits = classify(task.query_x)
        loss = self.loss(logits, task.query_y).mean()
        return loss, (loss.detach(), score(logits, task.query_y))

    def task_gradient(self, theta: Params, task: Episode) -> Gradient:
        """Gradient of the outer loss of one task with respect to theta."""
        grads, (loss, acc) = gradient(lambda at: self.task_loss(at, task), theta)
        return grads, loss, acc

    def stacked_gradient(self, theta: Params, batch: Episode) -> Gradient:
        """`task_gradient` of all tasks at once, each result with a tasks axis in front."""

        def one(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Gradient:
            return self.task_gradient(theta, Episode(sx, sy, qx, qy, batch.id, batch.n_way))

        return torch.vmap(one, randomness="different")(*batch[:4])

    def _chunks(self, batch: Episode, what: str, work: Callable[[Episode], R]) -> Iterator[R]:
        tasks, shapes = len(batch.query_y), (batch.support_x.shape[1:], batch.query_x.shape[1:])
        size = self._chunk_size(
            (what, *shapes), lambda: work(batch.part(slice(0, 1))), batch.query_x
        )
        return (work(batch.part(chunk)) for chunk in chunks(tasks, size))

    def _gradients(self, theta: Params, batch: Episode) -> Iterator[Gradient]:
        """Sums of gradients, losses and accuracies of the tasks, some tasks at a time."""
        if resolve(self.engine, batch.query_x.device) == "loop":
            if self._compiled:  # torch.compile is not made for several threads
                compiled = torch.compile(self.task_gradient)
                yield from (compiled(theta, task) for task in batch.tasks())
            else:
                yield from each_task(
                    self, lambda twin, t: twin.task_gradient(theta, t), batch.tasks()
                )
            return
        work = self.stacked_gradient
        if self._compiled:
            work = torch.compile(work)
        for sums in self._chunks(batch, "gradient", lambda part: work(theta, part)):
            gradients, losses, accuracies = sums
            yield {k: g.sum(0) for k, g in gradients.items()}, losses.sum(), accuracies.sum()

    def meta_loss(self, batch: Episode) -> tuple[Tensor, Tensor, Tensor]:
        """The meta-gradient g, computed here, as the gradient of an ordinary loss.

        The tensor to differentiate is <theta, stop_grad(g)>, so automatic optimisation, clipping
        and DDP need not know. Loss scaling (16-mixed) comes too late for the inner loop: on a GPU
        bf16-mixed is the safe half precision.
        """
        theta, point = dict(self.named_parameters()), self.theta()
        total = {k: torch.zeros_like(v) for k, v in point.items()}
        loss = acc = torch.zeros((), device=batch.query_y.device)
        for grads, task_loss, task_acc in self._gradients(point, batch):
            for k, g in grads.items():
                total[k] += g
            loss, acc = loss + task_loss, acc + task_acc
        tasks = len(batch.query_y)
        surrogate = torch.stack([(v * total[k]).sum() for k, v in theta.items()]).sum()
        return surrogate / tasks, loss / tasks, acc / tasks

    def compile_networks(self) -> None:
        """See `MetaLearner.compile_networks`; whole meta-gradients are compiled."""
        self._compiled = True
