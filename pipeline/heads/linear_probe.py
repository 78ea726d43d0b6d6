"""Logistic regression on embeddings. Tian et al. 2020 (RFS), https://arxiv.org/abs/2003.11539."""

from torch import Tensor

from pipeline.annotations import PositiveFloat
from pipeline.episode import Classifier
from pipeline.heads.base import Features, Head, prepared
from pipeline.solvers import logistic_regression


class LinearProbe(Head):
    """Multinomial logistic regression on the support set, regularised and to convergence.

    Args:
        features: what is done to embeddings first.
        l2: weight of the squared weights, halved, beside the sum of cross-entropies; 1 / C of
            scikit-learn.
    """

    transductive = False

    def __init__(self, features: Features, l2: PositiveFloat) -> None:
        super().__init__()
        self.features, self.l2 = features, l2

    def forward(
        self, support_z: Tensor, support_y: Tensor, n_way: int, base_mean: Tensor
    ) -> Classifier:
        """See `Head.forward`."""
        support_z = prepared(support_z, self.features, base_mean)
        weight, bias = logistic_regression(support_z, support_y, n_way, self.l2)
        return lambda query_z: prepared(query_z, self.features, base_mean) @ weight.T + bias
