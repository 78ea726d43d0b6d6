"""LaplacianShot. Ziko, Dolz, Granger, Ben Ayed 2020, https://arxiv.org/abs/2006.15486."""

import torch
from torch import Tensor

from pipeline.annotations import NonNegativeInt, PositiveFloat, PositiveInt
from pipeline.episode import Classifier
from pipeline.functional import squared_distances
from pipeline.heads.base import Features, Head, prepared
from pipeline.heads.bd_cspn import rectified_prototypes


def nearest_neighbours(z: Tensor, k: int) -> Tensor:
    """(q, q) ones where column j is one of the k nearest to row i, itself left out, else zeros."""
    q = len(z)
    distance = squared_distances(z, z)
    itself = torch.eye(q, dtype=torch.bool, device=z.device)
    nearest = distance.masked_fill(itself, float("inf")).topk(min(k, q - 1), largest=False).indices
    return torch.zeros_like(distance).scatter(1, nearest, 1.0)


def bound_updates(cost: Tensor, affinity: Tensor, weight: float, steps: int) -> Tensor:
    """Descend sum(Y log Y) + sum(Y a) - l/2 sum(Y'WY) over assignments Y (their eq. 5 and 9).

    Each step minimises a bound that touches the function at the present assignment, and so lowers
    it where W is positive semi-definite; their nearest neighbours need not be.

    Args:
        cost: (q, n_way) a, of assigning a query to a class.
        affinity: (q, q) W.
        weight: l.
        steps: how many.

    Returns:
        (q, n_way) logits of the assignments.
    """
    logits = -cost
    for _ in range(steps):
        logits = weight * (affinity @ logits.softmax(1)) - cost
    return logits


class LaplacianShot(Head):
    """Distances to rectified prototypes, smoothed over queries that are near each other.

    Args:
        features: what is done to embeddings first.
        sharpness: of the prototypes' rectification.
        neighbours: of a query, other queries. (Their code counts the query itself too.)
        weight: of the smoothing.
        steps: of the bound optimiser.
    """

    transductive = True

    def __init__(
        self,
        features: Features,
        sharpness: PositiveFloat,
        neighbours: PositiveInt,
        weight: float,
        steps: NonNegativeInt,
    ) -> None:
        super().__init__()
        self.features, self.sharpness = features, sharpness
        self.neighbours, self.weight, self.steps = neighbours, weight, steps

    def forward(
        self, support_z: Tensor, support_y: Tensor, n_way: int, base_mean: Tensor
    ) -> Classifier:
        """See `Head.forward`."""
        support_z = prepared(support_z, self.features, base_mean)

        def classify(query_z: Tensor) -> Tensor:
            query_z = prepared(query_z, self.features, base_mean)
            means = rectified_prototypes(support_z, support_y, n_way, query_z, self.sharpness)
            cost = squared_distances(query_z, means)
            affinity = nearest_neighbours(query_z, self.neighbours)
            return bound_updates(cost, affinity, self.weight, self.steps)

        return classify
