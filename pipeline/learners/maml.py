"""MAML, FOMAML and ANIL.

Finn, Abbeel, Levine 2017, https://arxiv.org/abs/1703.03400; ANIL (`adapted: head`): Raghu, Raghu,
Bengio, Vinyals 2020, https://arxiv.org/abs/1909.09157.
"""

from torch import Tensor, nn

from pipeline.annotations import NonNegativeInt, PositiveFloat, Ways
from pipeline.engine import Engine
from pipeline.functional import Params, inner_sgd
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.gradient import Adapted, GradientLearner


class Maml(GradientLearner):
    """Learn parameters from which a few steps of gradient descent solve a new task.

    Args:
        inner_lr: alpha of eq. 1.
        first_order: leave out second derivatives (FOMAML, section 5.2).
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
    ) -> None:
        super().__init__(
            backbone, n_way, inner_steps, eval_inner_steps, adapted, optimizer, scheduler, engine
        )
        self.inner_lr, self.first_order = inner_lr, first_order

    @property
    def label(self) -> str:
        """MAML, FOMAML, ANIL or FO-ANIL: which of the published variants this is."""
        prefix = "FO" if self.first_order else ""
        return f"{prefix}MAML" if self.adapted == "all" else f"{prefix and 'FO-'}ANIL"

    def inner_loop(self, phi: Params, x: Tensor, y: Tensor, steps: int) -> Params:
        """`steps` steps of gradient descent on the support loss."""
        return inner_sgd(
            lambda p: self.inner_loss(p, x, y), phi, self.inner_lr, steps, self.first_order
        )
