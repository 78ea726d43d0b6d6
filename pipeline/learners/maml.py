"""MAML, FOMAML, ANIL and BOIL.

Finn, Abbeel, Levine 2017, https://arxiv.org/abs/1703.03400; ANIL (`adapted: head`): Raghu, Raghu,
Bengio, Vinyals 2020, https://arxiv.org/abs/1909.09157; BOIL (`adapted: body`): Oh, Yoo, Kim, Yun
2021, https://arxiv.org/abs/2008.08882.
"""

from collections.abc import Callable

from torch import Tensor, nn

from pipeline.annotations import NonNegativeInt, PositiveFloat, Ways
from pipeline.engine import Engine
from pipeline.functional import Loss, Params
from pipeline.inner import PLAIN_DESCENT, Rule, descend
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.gradient import Adapted, GradientLearner


class Maml(GradientLearner):
    """Learn parameters from which a few steps of gradient descent solve a new task.

    Args:
        inner_lr: alpha of eq. 1.
        first_order: leave out second derivatives (FOMAML, section 5.2).
        inner_rule: what turns an inner gradient into a step; the paper has plain descent.
        The rest: see `GradientLearner`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        n_way: Ways,
        inner_lr: PositiveFloat,
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
        self.inner_lr, self.first_order, self.inner_rule = inner_lr, first_order, inner_rule

    @property
    def label(self) -> str:
        """MAML, FOMAML, ANIL, BOIL or FO-ANIL: which of the published variants this is."""
        name = {"all": "MAML", "head": "ANIL", "body": "BOIL"}[self.adapted]
        if not self.first_order:
            return name
        return f"FO{name}" if self.adapted == "all" else f"FO-{name}"

    def inner_loop(
        self, loss: Callable[[Params], Tensor], phi: Params, meta: Params, steps: int
    ) -> Params:
        """`steps` steps of gradient descent on the support loss."""
        return descend(loss, phi, self.inner_rule, self.inner_lr, steps, self.first_order)
