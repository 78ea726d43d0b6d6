"""MetaOptNet. Lee, Maji, Ravichandran, Soatto 2019, https://arxiv.org/abs/1904.03758."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.annotations import PositiveFloat, Probability
from pipeline.episode import Classifier
from pipeline.errors import UserError
from pipeline.functional import Loss
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.embedding import EmbeddingLearner
from pipeline.solvers import crammer_singer, indicators, ridge


class MetaOptNet(EmbeddingLearner):
    """Classify by a convex classifier without bias; the embedding learns through its optimum.

    Args:
        base_learner: the multi-class SVM of Crammer and Singer or ridge regression
            to indicators of the classes.
        c: weight of the support loss against ||W||^2 / 2; the lambda of the paper's ridge
            regression is 1/c.
        scale: the first factor of the logits; the paper's is 1.
        label_smoothing: the share of the target that the wrong classes get in training.
        The rest: see `EmbeddingLearner`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        base_learner: Literal["svm", "ridge"],
        c: PositiveFloat,
        scale: PositiveFloat,
        label_smoothing: Probability,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__(backbone, optimizer, scheduler, loss)
        if label_smoothing and loss != "cross_entropy":
            raise UserError(
                f"learner.label_smoothing: found {label_smoothing} with learner.loss={loss}; it "
                "goes with cross_entropy"
            )
        self.base_learner, self.c, self.label_smoothing = base_learner, c, label_smoothing
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    @property
    def label(self) -> str:
        """MetaOptNet-SVM or MetaOptNet-RR, as the paper calls them."""
        return f"MetaOptNet-{'SVM' if self.base_learner == 'svm' else 'RR'}"

    def head(self, support_z: Tensor, support_y: Tensor, n_way: int) -> Classifier:
        """Logits are the scaled scores of the classifier."""
        if self.base_learner == "svm":
            weight = crammer_singer(support_z, support_y, n_way, self.c)
        else:
            weight = ridge(support_z, indicators(support_y, n_way, support_z.dtype), 1 / self.c)
        return lambda query_z: self.scale * F.linear(query_z.to(weight.dtype), weight)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """See `MetaLearner.loss`; smoothed in training."""
        if not self.training or not self.label_smoothing:
            return super().loss(logits, y)
        n_way = logits.shape[-1]
        share = self.label_smoothing * n_way / (n_way - 1)  # torch counts the right class in
        return F.cross_entropy(logits.movedim(-1, 1), y, reduction="none", label_smoothing=share)
