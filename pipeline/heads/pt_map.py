"""PT-MAP. Hu, Gripon, Pateux 2021, https://arxiv.org/abs/2006.03806."""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor

from pipeline.annotations import Fraction, NonNegativeInt, PositiveInt
from pipeline.episode import Classifier
from pipeline.functional import prototypes, squared_distances
from pipeline.heads.base import Head
from pipeline.solvers import indicators

Sharpness = Annotated[float, Gt(0), Le(20)]
"""Squared distances reach 4; exp of -4 times more would be 0 in float32."""


def power_transform(z: Tensor, power: float) -> Tensor:
    """Embeddings (m, d) made more Gaussian, centred and of unit length (section 3.2 and code).

    The paper's embeddings are not negative; where one is, its sign stays.
    """
    sign = torch.where(z < 0, -1.0, 1.0)
    z = F.normalize(sign * (z.abs() + 1e-6).pow(power), dim=1)
    return F.normalize(z - z.mean(0), dim=1)


def sinkhorn(cost: Tensor, sharpness: float, steps: int) -> Tensor:
    """Entropic optimal transport of queries to classes of equal size (Cuturi 2013).

    Args:
        cost: (q, n_way).
        sharpness: l, of exp(-l cost).
        steps: how often rows and columns are scaled in turn.

    Returns:
        (q, n_way) logarithms of the plan; its rows sum to 1 and, the nearer the more steps, its
        columns to q / n_way.
    """
    q, n_way = cost.shape
    logits = -sharpness * cost
    kernel = (logits - logits.amax(1, keepdim=True)).exp()  # rows are scaled anyway
    share = q / n_way
    columns = torch.full_like(cost[0], 1.0)  # (n_way,)
    for _ in range(steps):
        rows = 1 / (kernel @ columns)
        columns = share / (rows @ kernel)
    return (kernel * columns).log().log_softmax(1)


def matched(
    support_z: Tensor, support_y: Tensor, n_way: int, query_z: Tensor,
    sharpness: float, rate: float, steps: int, sinkhorn_steps: int,
) -> Tensor:  # fmt: skip
    """Alternate between transport of queries to class means and means under it (algorithm 1).

    Returns:
        (q, n_way) logarithms of the last assignment.
    """
    means = prototypes(support_z, support_y, n_way)  # (n_way, d)
    y = indicators(support_y, n_way, support_z.dtype).T
    z = torch.cat([support_z, query_z])  # (m+q, d)
    for _ in range(steps):
        plan = sinkhorn(squared_distances(query_z, means), sharpness, sinkhorn_steps).exp()
        member = torch.cat([y, plan])  # (m+q, n_way)
        means = means + rate * (member.T @ z / member.sum(0).unsqueeze(1) - means)
    return sinkhorn(squared_distances(query_z, means), sharpness, sinkhorn_steps)


class PtMap(Head):
    """Power transform, then class means found by optimal transport.

    It is told that the queries fall into classes of equal size, which holds in the episodes here,
    and says little of a lone query.

    Args:
        power: of the transform.
        sharpness: l of the transport.
        rate: how far the means move in a step.
        steps: of means and transport in turn.
        sinkhorn_steps: of each transport.
    """

    transductive = True

    def __init__(
        self,
        power: Fraction,
        sharpness: Sharpness,
        rate: Fraction,
        steps: NonNegativeInt,
        sinkhorn_steps: PositiveInt,
    ) -> None:
        super().__init__()
        self.power, self.sharpness = power, sharpness
        self.rate, self.steps, self.sinkhorn_steps = rate, steps, sinkhorn_steps

    @property
    def label(self) -> str:
        """As the paper has it."""
        return "PT-MAP"

    def forward(
        self, support_z: Tensor, support_y: Tensor, n_way: int, base_mean: Tensor
    ) -> Classifier:
        """See `Head.forward`."""
        support_z = power_transform(support_z, self.power)
        return lambda query_z: matched(
            support_z, support_y, n_way, power_transform(query_z, self.power),
            self.sharpness, self.rate, self.steps, self.sinkhorn_steps,
        )  # fmt: skip
