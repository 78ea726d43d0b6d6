"""PixelCentroid: nearest class mean on raw pixels, the floor that every table shows."""

from torch import Tensor, nn

from pipeline.episode import Classifier
from pipeline.functional import count_ways, prototypes, squared_distances
from pipeline.learners.embedding import EmbeddingLearner


class PixelCentroid(EmbeddingLearner):
    """Untrained: the embedding is the image itself. What a learner adds, it adds to this."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), optimizer=None, scheduler=None)

    def head(self, support_z: Tensor, support_y: Tensor) -> Classifier:
        """Logits are minus the squared distances to the mean images."""
        means = prototypes(support_z, support_y, count_ways(support_y))  # (n_way, C*H*W)
        return lambda query_z: -squared_distances(query_z, means)
