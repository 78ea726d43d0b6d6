"""SimpleShot. Wang, Chao, Weinberger, van der Maaten 2019, https://arxiv.org/abs/1911.04623."""

from torch import Tensor

from pipeline.episode import Classifier
from pipeline.functional import nearest_mean
from pipeline.heads.base import Features, Head, prepared


class SimpleShot(Head):
    """Nearest class mean after a transformation of the embeddings.

    Args:
        features: UN (none), L2N (unit length) or CL2N (centred by the base mean, then unit length).
    """

    transductive = False

    def __init__(self, features: Features) -> None:
        super().__init__()
        self.features = features

    def forward(
        self, support_z: Tensor, support_y: Tensor, n_way: int, base_mean: Tensor
    ) -> Classifier:
        """See `Head.forward`."""
        support_z = prepared(support_z, self.features, base_mean)
        classify = nearest_mean(support_z, support_y, n_way)
        return lambda query_z: classify(prepared(query_z, self.features, base_mean))
