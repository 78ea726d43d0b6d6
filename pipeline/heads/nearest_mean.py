"""Nearest class mean, ProtoNet's rule. Snell et al. 2017, https://arxiv.org/abs/1703.05175."""

from torch import Tensor

from pipeline.episode import Classifier
from pipeline.functional import nearest_mean
from pipeline.heads.base import Head


class NearestMean(Head):
    """Logits are minus the squared distances to the mean embedding of each class."""

    transductive = False

    def forward(
        self, support_z: Tensor, support_y: Tensor, n_way: int, base_mean: Tensor
    ) -> Classifier:
        """See `Head.forward`."""
        return nearest_mean(support_z, support_y, n_way)
