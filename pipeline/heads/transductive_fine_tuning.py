"""Transductive fine-tuning. Dhillon et al. 2020, https://arxiv.org/abs/1909.02729."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.annotations import NonNegativeInt, PositiveFloat
from pipeline.episode import Classifier
from pipeline.functional import prototypes
from pipeline.heads.base import Head
from pipeline.heads.descent import adam, by_logits
from pipeline.solvers import indicators


class TransductiveFineTuning(Head):
    """Cross-entropy of the support set and entropy of the queries' predictions are descended.

    From the class means, as the paper's support-based initialisation (section 3.1-3.2). The paper
    fine-tunes the whole network; here it stays frozen and the last layer alone is tuned.

    Args:
        steps, lr: of Adam.
        scale: of the logits, products of embeddings and class weights.
        entropy_weight: of the queries' entropy.
    """

    transductive = True

    def __init__(
        self, steps: NonNegativeInt, lr: PositiveFloat, scale: PositiveFloat, entropy_weight: float
    ) -> None:
        super().__init__()
        self.features = "L2N"
        self.steps, self.lr, self.scale = steps, lr, scale
        self.entropy_weight = entropy_weight

    @property
    def label(self) -> str:
        """In words."""
        return "transductive fine-tuning"

    def forward(
        self, support_z: Tensor, support_y: Tensor, n_way: int, base_mean: Tensor
    ) -> Classifier:
        """See `Head.forward`."""
        support_z = F.normalize(support_z, dim=1)
        start = F.normalize(prototypes(support_z, support_y, n_way), dim=1)
        start = F.pad(start, (0, 1))  # (n_way, d+1), the bias last
        y = indicators(support_y, n_way, support_z.dtype)  # (n_way, m)

        def classify(query_z: Tensor) -> Tensor:
            query_z = F.normalize(query_z, dim=1)
            z = torch.cat([support_z, query_z])  # (m+q, d)
            w = adam(lambda w: self.gradient(w, z, y), start, self.lr, self.steps)
            return self._logits(w, query_z).T

        return classify

    def _logits(self, w: Tensor, z: Tensor) -> Tensor:
        """(n_way, d+1), (m, d) -> (n_way, m)."""
        return self.scale * (w[:, :-1] @ z.T + w[:, -1:])

    def gradient(self, w: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """Of what is descended (their eq. 8), with respect to w.

        Args:
            w: (n_way, d+1).
            z: (m+q, d), the support set first.
            y: (n_way, m), its labels as zeros and ones.
        """
        log_p = self._logits(w, z).log_softmax(0)  # (n_way, m+q)
        g = by_logits(log_p, y, fit=1.0, marginal=0.0, conditional=self.entropy_weight)
        return self.scale * torch.cat([g @ z, g.sum(1, keepdim=True)], dim=1)
