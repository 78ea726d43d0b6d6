"""Baseline and Baseline++. Chen, Liu, Kira, Wang, Huang 2019, https://arxiv.org/abs/1904.04232."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.annotations import NonNegativeInt, PositiveFloat
from pipeline.episode import Classifier
from pipeline.functional import canonical_order, prototypes
from pipeline.heads.base import Head, cosine
from pipeline.heads.descent import adam
from pipeline.solvers import indicators


class Baseline(Head):
    """A new last layer, trained on the support set for a while.

    Baseline is linear with a bias, from zero. Baseline++ gives scaled cosines to class weights,
    from the class means. The paper trains by SGD on batches of four from random weights; here
    Adam sees the whole set, so that neither order nor chance matters.

    Args:
        cosine: Baseline++.
        steps, lr: of Adam.
        scale: of the cosines.
        weight_decay: times the weights is added to their gradient.
    """

    transductive = False

    def __init__(
        self,
        cosine: bool,
        steps: NonNegativeInt,
        lr: PositiveFloat,
        scale: PositiveFloat,
        weight_decay: float,
    ) -> None:
        super().__init__()
        self.cosine, self.steps, self.lr = cosine, steps, lr
        self.scale, self.weight_decay = scale, weight_decay

    @property
    def label(self) -> str:
        """As the paper has it."""
        return "Baseline++" if self.cosine else "Baseline"

    def forward(
        self, support_z: Tensor, support_y: Tensor, n_way: int, base_mean: Tensor
    ) -> Classifier:
        """See `Head.forward`."""
        # Adam makes a step of a gradient that is 0 but for rounding; sums round by their order
        order = canonical_order(support_z, support_y)
        support_z, support_y = support_z[order], support_y[order]
        start = F.normalize(prototypes(support_z, support_y, n_way), dim=1)  # (n_way, d)
        if not self.cosine:
            start = torch.zeros_like(F.pad(start, (0, 1)))  # (n_way, d+1), the bias last
        y = indicators(support_y, n_way, support_z.dtype)  # (n_way, m)
        w = adam(lambda w: self.gradient(w, support_z, y), start, self.lr, self.steps)
        return lambda query_z: self._logits(w, query_z).T

    def _logits(self, w: Tensor, z: Tensor) -> Tensor:
        """Weights and embeddings (m, d) -> (n_way, m)."""
        if self.cosine:
            return self.scale * cosine(w, z)
        return w[:, :-1] @ z.T + w[:, -1:]

    def gradient(self, w: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """Of mean cross-entropy and half the decay times the squared weights, by the weights.

        Args:
            w: (n_way, d), of Baseline (n_way, d+1).
            z: (m, d).
            y: (n_way, m), labels as zeros and ones.
        """
        g = (self._logits(w, z).softmax(0) - y) / len(z)  # (n_way, m)
        if self.cosine:
            length = w.norm(dim=1, keepdim=True).clamp(min=1e-12)  # as F.normalize; a mean may be 0
            direction, along = w / length, self.scale * (g @ F.normalize(z, dim=1))
            of_loss = (along - (along * direction).sum(1, keepdim=True) * direction) / length
        else:
            of_loss = torch.cat([g @ z, g.sum(1, keepdim=True)], dim=1)
        return of_loss + self.weight_decay * w
