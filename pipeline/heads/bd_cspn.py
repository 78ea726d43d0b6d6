"""BD-CSPN, prototype rectification. Liu, Song, Qin 2020, https://arxiv.org/abs/1911.10713."""

import torch
from torch import Tensor

from pipeline.annotations import PositiveFloat
from pipeline.episode import Classifier
from pipeline.functional import prototypes
from pipeline.heads.base import Features, Head, cosine, prepared
from pipeline.solvers import indicators


def rectified_prototypes(
    support_z: Tensor, support_y: Tensor, n_way: int, query_z: Tensor, sharpness: float
) -> Tensor:
    """Class means in which queries take part under the labels of the nearest class mean.

    Liu et al. 2020, eq. 3-7: queries are shifted so that their mean is that of the support set, and
    each image of a class has the weight exp(e cos), by the cosine to the class mean. The paper
    takes the most confident queries of a class; here, as in later comparisons, all.

    Args:
        support_z, support_y, n_way: see `Head.forward`.
        query_z: (q, d).
        sharpness: e.

    Returns:
        (n_way, d).
    """
    query_z = query_z + (support_z.mean(0) - query_z.mean(0))
    z = torch.cat([support_z, query_z])  # (m+q, d)
    similarity = cosine(z, prototypes(support_z, support_y, n_way))  # (m+q, n_way)
    guessed = similarity[len(support_y) :].argmax(1)
    member = indicators(torch.cat([support_y, guessed]), n_way, torch.bool).T
    weight = (sharpness * similarity).masked_fill(~member, float("-inf")).softmax(0)
    return weight.T @ z


class BdCspn(Head):
    """Logits are scaled cosines to the rectified prototypes.

    Args:
        features: what is done to embeddings first.
        sharpness: of weights and logits.
    """

    transductive = True

    def __init__(self, features: Features, sharpness: PositiveFloat) -> None:
        super().__init__()
        self.features, self.sharpness = features, sharpness

    @property
    def label(self) -> str:
        """As the paper has it."""
        return "BD-CSPN"

    def forward(
        self, support_z: Tensor, support_y: Tensor, n_way: int, base_mean: Tensor
    ) -> Classifier:
        """See `Head.forward`."""
        support_z = prepared(support_z, self.features, base_mean)

        def classify(query_z: Tensor) -> Tensor:
            query_z = prepared(query_z, self.features, base_mean)
            means = rectified_prototypes(support_z, support_y, n_way, query_z, self.sharpness)
            return self.sharpness * cosine(query_z, means)

        return classify
