"""Cosine to the class mean. Chen et al. 2021 (Meta-Baseline), https://arxiv.org/abs/2003.04390."""

from torch import Tensor

from pipeline.annotations import PositiveFloat
from pipeline.episode import Classifier
from pipeline.functional import prototypes
from pipeline.heads.base import Head, cosine


class Cosine(Head):
    """Logits are scaled cosines to the mean embedding of each class (their eq. 2).

    Args:
        scale: of the logits; changes no prediction.
    """

    transductive = False

    def __init__(self, scale: PositiveFloat) -> None:
        super().__init__()
        self.scale = scale

    def forward(
        self, support_z: Tensor, support_y: Tensor, n_way: int, base_mean: Tensor
    ) -> Classifier:
        """See `Head.forward`."""
        means = prototypes(support_z, support_y, n_way)  # (n_way, d)
        return lambda query_z: self.scale * cosine(query_z, means)
