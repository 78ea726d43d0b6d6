"""MAML++. Antoniou, Edwards, Storkey 2019, https://arxiv.org/abs/1810.09502."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.annotations import NonNegativeInt, PositiveFloat, PositiveInt, Ways
from pipeline.blocks import BatchStatsNorm, ConvBlock, FirstBlock
from pipeline.engine import Engine, twin
from pipeline.episode import Episode
from pipeline.errors import UserError
from pipeline.functional import Loss, Params, score
from pipeline.inner import PLAIN_DESCENT, Rule, State, inner_step
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.gradient import Adapted, Bound, GradientLearner, below, parameter_dict

MOMENTUM = 0.1
"""Weight of a new batch in running statistics, as in torch."""


class MamlPlusPlus(GradientLearner):
    """MAML with learned rates and norms of each inner step, and losses after each of them.

    Step t of the inner loop, and the queries after it, use the t-th rates and norms; evaluation in
    more steps than there are stays with the last ones.

    Args:
        inner_lr: where the rates start; learned, one for each parameter tensor and step (LSLR).
        multi_step_until: the outer step from which only the loss after the last inner step counts;
            until then those after each, see `multi_step_weights` (MSL). 0: from the beginning.
        second_order_from: the outer step before which second derivatives are left out (DA).
        per_step_norms: each inner step has scales and shifts of the norms of its own, which the
            outer loop learns and the inner loop leaves alone (BNWB, as in the authors' code).
        running_statistics: normalise queries, in evaluation, by running statistics of training
            queries after the same step (BNRS), which makes this inductive. The authors' code keeps
            such statistics, but normalises by those of the batch at hand.
        inner_rule: what turns an inner gradient into a step; the paper has plain descent.
        The rest: see `GradientLearner`.
    """

    label = "MAML++"

    def __init__(
        self,
        backbone: nn.Module,
        n_way: Ways,
        inner_lr: PositiveFloat,
        inner_steps: PositiveInt,
        eval_inner_steps: NonNegativeInt,
        multi_step_until: NonNegativeInt,
        second_order_from: NonNegativeInt,
        per_step_norms: bool,
        running_statistics: bool,
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
        self.multi_step_until, self.second_order_from = multi_step_until, second_order_from
        self.per_step_norms, self.running_statistics = per_step_norms, running_statistics
        self.inner_rule, self.first_order = inner_rule, False
        self.step_weights = [0.0] * (inner_steps - 1) + [1.0]
        if adapted == "head" and (per_step_norms or running_statistics):
            raise UserError(
                "learner.adapted: found head, but norms of each step (learner.per_step_norms, "
                "learner.running_statistics) are those of the body; both must then be false"
            )
        kinds = (BatchStatsNorm, nn.GroupNorm) if per_step_norms else ()
        norms = [(n, m) for n, m in self.net.named_modules() if isinstance(m, kinds)]
        self._norms = [f"{n}.{k}" for n, m in norms for k, _ in m.named_parameters()]
        if inner_steps > 1:  # those of the first step are the network's own
            first = below(self.theta(), "net")
            self.later_norms = parameter_dict(
                {k: first[k].repeat(inner_steps - 1, 1) for k in self._norms}
            )
        phi = self.bind(self.theta()).phi
        self.rates = parameter_dict({k: torch.full((inner_steps,), inner_lr) for k in phi})
        if running_statistics:
            self._start_statistics()

    @property
    def protocol(self) -> str:
        """See `MetaLearner.protocol`."""
        return "inductive" if self.running_statistics else super().protocol

    def bind(self, theta: Params) -> Bound:
        """See `GradientLearner.bind`; norms of each step move from phi to meta."""
        bound = super().bind(theta)
        later = below(bound.meta, "later_norms")
        norms = {k: bound.phi[k].unsqueeze(0) for k in self._norms}
        norms = {k: torch.cat([v, later[k]]) if later else v for k, v in norms.items()}
        return bound._replace(
            phi={k: v for k, v in bound.phi.items() if k not in norms},
            meta=bound.meta | {f"norms.{k}": v for k, v in norms.items()},
        )

    def trajectory(
        self, loss: Callable[[Params], Tensor], phi: Params, meta: Params, steps: int
    ) -> Iterator[Params]:
        """What to classify queries by after 1, 2, ..., `steps` steps; norms included."""
        rates, norms = below(meta, "rates"), below(meta, "norms")
        state: State = {}
        for t in range(steps):
            row = min(t, self.inner_steps - 1)
            rate, norm = ({k: v[row] for k, v in rows.items()} for rows in (rates, norms))
            normed = partial(lambda norm, p: loss(p | norm), norm)
            phi, state = inner_step(normed, phi, self.inner_rule, rate, state, t, self.first_order)
            yield phi | norm

    def inner_loop(
        self, loss: Callable[[Params], Tensor], phi: Params, meta: Params, steps: int
    ) -> Params:
        """The end of `trajectory`; in evaluation with running statistics, if there are any."""
        end = phi | {k: v[0] for k, v in below(meta, "norms").items()}
        for adapted in self.trajectory(loss, phi, meta, steps):
            end = adapted
        if not self.running_statistics or self.training:
            return end
        row = max(0, min(steps, self.inner_steps) - 1)
        return end | {f"{k}.statistics": v[row] for k, v in self._statistics().items()}

    def task_loss(self, theta: Params, task: Episode) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See `GradientLearner.task_loss`; query losses of all steps come from one trajectory."""
        start, meta, features, predict = self.bind(theta)
        z, query_z = features(task.support_x), features(task.query_x)
        total = torch.zeros((), device=task.query_y.device)
        ends = self.trajectory(
            lambda p: self.loss(predict(p, z), task.support_y).mean(), start, meta, self.inner_steps
        )
        for weight, phi in zip(self.step_weights, ends, strict=True):
            if weight:
                logits = predict(phi, query_z)
                loss = self.loss(logits, task.query_y).mean()
                total = total + weight * loss
        return total, (loss.detach(), score(logits, task.query_y))

    def meta_loss(self, batch: Episode) -> tuple[Tensor, Tensor, Tensor]:
        """See `GradientLearner.meta_loss`; annealed by the outer step."""
        self.first_order = self.global_step < self.second_order_from
        self.step_weights = [0.0] * (self.inner_steps - 1) + [1.0]
        if self.global_step < self.multi_step_until:
            annealed = self.global_step / self.multi_step_until
            self.step_weights = multi_step_weights(self.inner_steps, annealed)
        return super().meta_loss(batch)

    def training_step(self, batch: Episode, batch_idx: int) -> Tensor:
        """See `MetaLearner.training_step`; running statistics come from the batch's first task."""
        if self.running_statistics:
            self._keep_statistics(batch.part(0))
        return super().training_step(batch, batch_idx)

    def _start_statistics(self) -> None:
        self.statistics = nn.Module()
        for name, norm in self.net.named_modules():
            if isinstance(norm, BatchStatsNorm):
                norm.statistics = torch.empty(2, 0)  # so that a call may give some
                start = torch.stack([torch.zeros_like(norm.bias), torch.ones_like(norm.weight)])
                rows = start.detach().repeat(self.inner_steps, 1, 1)  # (steps, 2, channels)
                self.statistics.register_buffer(name.replace(".", "/"), rows)
        if not self._statistics():
            raise UserError(
                "learner.running_statistics: found true, but no norm has any: set "
                "backbone.norm=batch_stats"
            )

    def _statistics(self) -> Params:
        return below(dict(self.named_buffers()), "statistics")

    @torch.no_grad()
    def _keep_statistics(self, task: Episode) -> None:
        """Move the running statistics towards those of the queries after each inner step."""
        watcher, running = twin(self), self._statistics()
        for part in watcher.modules():
            if isinstance(part, FirstBlock):  # it does without calling its norm
                part.__class__ = ConvBlock  # type: ignore[assignment]  # back to its parent; mypy takes __class__ for constant

        def watch(row: Tensor, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].to(row.dtype)
            var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=1)
            row.lerp_(torch.stack([mean, var]), MOMENTUM)

        start, meta, features, predict = watcher.bind(watcher.theta())
        z, query_z = features(task.support_x), features(task.query_x)
        ends = watcher.trajectory(
            lambda p: self.loss(predict(p, z), task.support_y).mean(), start, meta, self.inner_steps
        )
        for t, phi in enumerate(ends):
            hooks = [
                watcher.net.get_submodule(k).register_forward_pre_hook(partial(watch, rows[t]))
                for k, rows in running.items()
            ]
            predict(phi, query_z)
            for hook in hooks:
                hook.remove()


def multi_step_weights(steps: int, annealed: float) -> list[float]:
    """Weights of the query losses after each inner step; they add up to 1.

    All equal at first. Those before the last fall linearly, to 0.03 of that, and the last one takes
    what they give up (section 4; the constants are those of the authors' code).

    Args:
        annealed: share of the annealing that is over, 0..1.
    """
    before = max(1 - annealed, 0.03) / steps
    return [before] * (steps - 1) + [1 - (steps - 1) * before]
