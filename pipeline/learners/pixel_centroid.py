"""PixelCentroid: nearest class mean on raw pixels, the floor that every table shows."""

from torch import Tensor, nn

from pipeline.episode import Classifier
from pipeline.functional import nearest_mean
from pipeline.learners.embedding import EmbeddingLearner


class PixelCentroid(EmbeddingLearner):
    """Untrained: the embedding is the image itself. What a learner adds, it adds to this."""

    embeds_once = False  # a split as floats would be four times the pool, which may fill the disk

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), optimizer=None, scheduler=None)

    def head(self, support_z: Tensor, support_y: Tensor, n_way: int) -> Classifier:
        """Logits are minus the squared distances to the mean images."""
        return nearest_mean(support_z, support_y, n_way)
