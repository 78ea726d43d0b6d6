"""TIM-GD. Boudiaf, Ziko, Rony, Dolz, Piantanida, Ben Ayed 2020, https://arxiv.org/abs/2008.11297."""

import torch
from torch import Tensor

from pipeline.annotations import NonNegativeInt, PositiveFloat
from pipeline.episode import Classifier
from pipeline.functional import prototypes
from pipeline.heads.base import Features, Head, prepared
from pipeline.heads.descent import adam, by_logits
from pipeline.solvers import indicators


class Tim(Head):
    """Class weights that fit the support set and are informative about the queries.

    Adam descends l CE - (m H(Y) - a H(Y|X)) from the class means: cross-entropy of the support
    set, entropy of the mean prediction and mean entropy of the predictions of the queries (their
    eq. 2-4), with softmax probabilities of -t/2 ||w - z||^2 (eq. 1).

    Args:
        features: what is done to embeddings first.
        steps, lr: of Adam.
        temperature: t.
        support_weight, marginal_weight, conditional_weight: l, m and a.
    """

    transductive = True

    def __init__(
        self,
        features: Features,
        steps: NonNegativeInt,
        lr: PositiveFloat,
        temperature: PositiveFloat,
        support_weight: float,
        marginal_weight: float,
        conditional_weight: float,
    ) -> None:
        super().__init__()
        self.features = features
        self.steps, self.lr, self.temperature = steps, lr, temperature
        self.support_weight = support_weight
        self.marginal_weight, self.conditional_weight = marginal_weight, conditional_weight

    @property
    def label(self) -> str:
        """As the paper has it."""
        return "TIM"

    def forward(
        self, support_z: Tensor, support_y: Tensor, n_way: int, base_mean: Tensor
    ) -> Classifier:
        """See `Head.forward`."""
        support_z = prepared(support_z, self.features, base_mean)
        start = prototypes(support_z, support_y, n_way)  # (n_way, d)
        y = indicators(support_y, n_way, support_z.dtype)  # (n_way, m)

        def classify(query_z: Tensor) -> Tensor:
            query_z = prepared(query_z, self.features, base_mean)
            z = torch.cat([support_z, query_z])  # (m+q, d)
            w = adam(lambda w: self.gradient(w, z, y), start, self.lr, self.steps)
            return self._logits(w, query_z).T

        return classify

    def _logits(self, w: Tensor, z: Tensor) -> Tensor:
        """(n_way, d), (m, d) -> (n_way, m), up to a constant of each image.

        Classes lead: with few rows in front, products take half the time.
        """
        return self.temperature * (w @ z.T - w.square().sum(1, keepdim=True) / 2)

    def gradient(self, w: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """Of what is descended, with respect to w.

        Args:
            w: (n_way, d).
            z: (m+q, d), the support set first.
            y: (n_way, m), its labels as zeros and ones.
        """
        log_p = self._logits(w, z).log_softmax(0)  # (n_way, m+q)
        weights = (self.support_weight, self.marginal_weight, self.conditional_weight)
        g = by_logits(log_p, y, *weights)
        return self.temperature * (g @ z - g.sum(1, keepdim=True) * w)
