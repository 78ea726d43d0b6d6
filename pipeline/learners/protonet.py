"""Prototypical networks. Snell, Swersky, Zemel 2017, https://arxiv.org/abs/1703.05175."""

from torch import Tensor

from pipeline.episode import Classifier
from pipeline.functional import nearest_mean
from pipeline.learners.embedding import EmbeddingLearner


class ProtoNet(EmbeddingLearner):
    """Classify by squared Euclidean distance to the mean support embedding of each class."""

    def head(self, support_z: Tensor, support_y: Tensor, n_way: int) -> Classifier:
        """Logits are minus the squared distances to the prototypes (eq. 1-2 of the paper)."""
        return nearest_mean(support_z, support_y, n_way)
