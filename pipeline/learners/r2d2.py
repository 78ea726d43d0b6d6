"""R2-D2 and LR-D2. Bertinetto, Henriques, Torr, Vedaldi 2019, https://arxiv.org/abs/1805.08136."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.annotations import PositiveFloat, PositiveInt
from pipeline.episode import Classifier
from pipeline.functional import Loss
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.embedding import EmbeddingLearner
from pipeline.solvers import indicators, irls, ridge


class R2D2(EmbeddingLearner):
    """Classify by a regression on the support embeddings, solved within the gradient's reach.

    The regression has a bias, as weight of a constant 1. Its l2 (in the log) and the scale of the
    logits are learned with the embedding; the paper's offset only with another loss
    than cross-entropy, which does not see what is the same for all classes.

    Args:
        base_learner: ridge regression to indicators of the classes (R2-D2, section 3.2) or a
            logistic regression of each class against the rest (LR-D2, section 3.3).
        steps: of iteratively reweighted least squares, for LR-D2.
        l2: the first lambda, per support image: it weighs ||W||^2 against the mean of the losses,
            so that it can stay as it is for other numbers of shots.
        scale: the first factor of the logits.
        The rest: see `EmbeddingLearner`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        base_learner: Literal["ridge", "logistic"],
        l2: PositiveFloat,
        scale: PositiveFloat,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        steps: PositiveInt = 5,
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__(backbone, optimizer, scheduler, loss)
        self.base_learner, self.steps = base_learner, steps
        self.log_l2 = nn.Parameter(torch.tensor(math.log(l2)))
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.offset = nn.Parameter(torch.zeros(())) if loss != "cross_entropy" else 0.0

    @property
    def label(self) -> str:
        """R2-D2 or LR-D2, as the paper calls them."""
        return "R2-D2" if self.base_learner == "ridge" else "LR-D2"

    def head(self, support_z: Tensor, support_y: Tensor, n_way: int) -> Classifier:
        """Logits are the scaled predictions of the regression."""
        z, l2 = _with_one(support_z), self.log_l2.exp() * len(support_y)
        if self.base_learner == "ridge":
            weight = ridge(z, indicators(support_y, n_way, z.dtype), l2)
        else:
            weight = irls(z, support_y, n_way, l2, self.steps)
        return lambda query_z: self.scale * F.linear(_with_one(query_z), weight) + self.offset


def _with_one(z: Tensor) -> Tensor:
    """(m, d) -> (m, d+1)."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return F.pad(z, (0, 1), value=1.0)
