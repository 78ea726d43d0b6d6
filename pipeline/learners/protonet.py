"""Prototypical networks. Snell, Swersky, Zemel 2017, https://arxiv.org/abs/1703.05175."""

from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.annotations import PositiveFloat
from pipeline.episode import Classifier
from pipeline.functional import Loss, nearest_mean, prototypes
from pipeline.heads.base import cosine
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.embedding import EmbeddingLearner


class ProtoNet(EmbeddingLearner):
    """Classify by distance to the mean support embedding of each class.

    Args:
        distance: squared Euclidean, or cosine (the paper compares the two).
        scale: factor of the logits, an inverse temperature.
        learn_scale: train the scale with the embedding, from that value on.
        The rest: see `EmbeddingLearner`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        scale: PositiveFloat = 1.0,
        learn_scale: bool = False,
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__(backbone, optimizer, scheduler, loss)
        self.distance = distance
        self.scale = nn.Parameter(torch.tensor(float(scale))) if learn_scale else scale

    @property
    def label(self) -> str:
        """ProtoNet, with the distance if it is not the paper's."""
        return "ProtoNet" if self.distance == "euclidean" else "ProtoNet (cosine)"

    def head(self, support_z: Tensor, support_y: Tensor, n_way: int) -> Classifier:
        """Logits are minus the squared distances to the prototypes (eq. 1-2), or cosines."""
        if self.distance == "euclidean":
            classify = nearest_mean(support_z, support_y, n_way)
            return lambda query_z: self.scale * classify(query_z)
        means = prototypes(support_z, support_y, n_way)  # (n_way, d)
        return lambda query_z: self.scale * cosine(query_z, means)
