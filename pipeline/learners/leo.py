"""LEO. Rusu et al. 2019, https://arxiv.org/abs/1807.05960."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.annotations import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pipeline.backbones import out_dim
from pipeline.episode import Classifier, Episode
from pipeline.functional import Loss, accuracy, prototypes
from pipeline.inner import SGD, descend
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.embedding import EmbeddingLearner

PAIRED = 2**23  # numbers in the pairs of codes that the relation network sees at a time


class Solution(NamedTuple):
    """What a support set comes to.

    Attributes:
        weights: (n_way, d) of a linear classifier without bias.
        mean, std: (n_way, latent) of the code of each class.
        start, end: (n_way, latent) codes before and after the inner loop.
    """

    weights: Tensor
    mean: Tensor
    std: Tensor
    start: Tensor
    end: Tensor


class Leo(EmbeddingLearner):
    """Adapt a small code of each class, which is decoded to the weights of a linear classifier.

    Encoder and relation network see the support embeddings and give each class a Gaussian code
    (eq. 4); gradient descent on the support loss moves the codes (eq. 5), then for a few steps the
    decoded weights. In training both are samples, with noise drawn once a task; evaluation takes
    the means. All this works on embeddings, for any number of classes: an embedding learner.

    The paper trains this on embeddings of a fixed, supervised network (WRN-28-10); here the
    backbone trains along, and its dropout stands for theirs. Deviations are softplus, for their
    exponential cut off below zero; their L2 penalty is `optimizer.weight_decay`.

    Args:
        latent: numbers in a code.
        inner_steps, inner_lr: in the space of codes, on the sum over classes of their mean losses;
            the learned rates of its dimensions start at inner_lr.
        finetuning_steps, finetuning_lr: the same in the space of weights.
        kl_weight: beta of eq. 6, of the mean over dimensions as in the authors' code.
        encoder_weight: gamma, of the squared way that codes went, so that the encoder goes it.
        orthogonality_weight: lambda_2 of eq. 7, of the correlations of the decoder's rows.
    """

    def __init__(
        self,
        backbone: nn.Module,
        latent: PositiveInt,
        inner_steps: NonNegativeInt,
        inner_lr: PositiveFloat,
        finetuning_steps: NonNegativeInt,
        finetuning_lr: PositiveFloat,
        kl_weight: NonNegativeFloat,
        encoder_weight: NonNegativeFloat,
        orthogonality_weight: NonNegativeFloat,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__(backbone, optimizer, scheduler, loss)
        self.inner_steps, self.finetuning_steps = inner_steps, finetuning_steps
        self.kl_weight, self.encoder_weight = kl_weight, encoder_weight
        self.orthogonality_weight = orthogonality_weight
        d = out_dim(backbone)
        both = 2 * latent
        self.encoder = nn.Linear(d, latent, bias=False)
        self.relation = nn.Sequential(
            nn.Linear(both, both, bias=False), nn.ReLU(),
            nn.Linear(both, both, bias=False), nn.ReLU(),
            nn.Linear(both, both, bias=False),
        )  # fmt: skip
        self.decoder = nn.Linear(latent, 2 * d, bias=False)
        for part in (self.encoder, self.relation, self.decoder):
            for weight in part.parameters():
                nn.init.xavier_uniform_(weight)
        self.inner_lr = nn.Parameter(torch.full((latent,), float(inner_lr)))
        self.finetuning_lr = nn.Parameter(torch.full((d,), float(finetuning_lr)))

    @property
    def label(self) -> str:
        """As the paper writes it."""
        return "LEO"

    def embed(self, x: Tensor) -> Tensor:
        """Images (m, C, H, W) -> embeddings (m, d) of length 1, as in the authors' code."""
        return F.normalize(self.backbone(x), dim=1)

    def encode(self, support_z: Tensor, support_y: Tensor, n_way: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each class's code, (n_way, latent) each.

        Eq. 4: the relation network sees every pair of support images, and its output is averaged
        over the first ones of a class and all second ones.
        """
        e = self.encoder(support_z)  # (m, latent)
        m = len(e)
        first, second = e.unsqueeze(1).expand(m, m, -1), e.unsqueeze(0).expand(m, m, -1)
        related = self.relation(torch.cat([first, second], 2)).mean(1)  # (m, 2 * latent)
        mean, spread = prototypes(related, support_y, n_way).chunk(2, 1)
        return mean, deviation(spread)

    def decode(self, code: Tensor, noise: Tensor | None) -> Tensor:
        """Weights (n_way, d) of codes (n_way, latent): the mean, or a sample by (n_way, d) noise.

        Their deviation is at first that of Glorot's initialisation, as in the authors' code.
        """
        mean, spread = self.decoder(code).chunk(2, 1)  # (n_way, d) each
        if noise is None:
            return mean
        return mean + (2 / sum(mean.shape)) ** 0.5 * deviation(spread) * noise

    def solve(
        self,
        support_z: Tensor,
        support_y: Tensor,
        n_way: int,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> Solution:
        """Algorithm 1, lines 5 to 11, and the steps in the space of weights (section 2.4).

        Args:
            support_z, support_y, n_way: see `EmbeddingLearner.head`.
            noise: standard normal, (n_way, latent) for the codes and (n_way, d) for the weights;
                None takes the means.
        """

        def loss(weights: Tensor) -> Tensor:  # a sum over classes: its steps fit any number of them
            return n_way * self.loss(support_z @ weights.T, support_y).mean()

        mean, std = self.encode(support_z, support_y, n_way)
        of_code, of_weights = noise or (None, None)
        start = mean if of_code is None else mean + std * of_code
        end = descend(
            lambda p: loss(self.decode(p["code"], of_weights)),
            {"code": start}, SGD(), {"code": self.inner_lr}, self.inner_steps, first_order=False,
        )["code"]  # fmt: skip
        weights = descend(
            lambda p: loss(p["weights"]),
            {"weights": self.decode(end, of_weights)}, SGD(), {"weights": self.finetuning_lr},
            self.finetuning_steps, first_order=False,
        )["weights"]  # fmt: skip
        return Solution(weights, mean, std, start, end)

    def head(self, support_z: Tensor, support_y: Tensor, n_way: int) -> Classifier:
        """See `EmbeddingLearner.head`; without noise."""
        weights = self.solve(support_z, support_y, n_way).weights
        return lambda query_z: query_z @ weights.T

    def heads(self, support_z: Tensor, support_y: Tensor, query_z: Tensor, n_way: int) -> Tensor:
        """See `EmbeddingLearner.heads`; as many tasks at a time as have few enough pairs."""
        size = max(1, PAIRED // (support_y.shape[1] ** 2 * 2 * len(self.inner_lr)))
        head = torch.vmap(lambda z, y, q: self.head(z, y, n_way)(q), chunk_size=size)
        return head(support_z, support_y, query_z)

    def meta_loss(self, batch: Episode) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 6, with noise; see `MetaLearner.meta_loss`."""
        support_z, query_z = self.embed_tasks(batch)
        tasks, n_way = len(support_z), batch.n_way
        sizes = (tasks, n_way, len(self.inner_lr)), (tasks, n_way, len(self.finetuning_lr))
        noise = tuple(torch.randn(s, dtype=support_z.dtype, device=self.device) for s in sizes)

        def one(z: Tensor, y: Tensor, query: Tensor, *noise: Tensor) -> tuple[Tensor, ...]:
            found = self.solve(z, y, n_way, (noise[0], noise[1]))
            way = (found.end.detach() - found.start).square().mean()
            return query @ found.weights.T, kl_divergence(found.mean, found.std), way

        logits, kl, way = torch.vmap(one)(support_z, batch.support_y, query_z, *noise)
        loss = self.loss(logits, batch.query_y).mean()
        objective = loss + self.kl_weight * kl.mean() + self.encoder_weight * way.mean()
        objective = objective + self.orthogonality_weight * correlation(self.decoder.weight.T)
        return objective, loss.detach(), accuracy(logits, batch.query_y).mean()


def deviation(x: Tensor) -> Tensor:
    """Softplus, 1 at 0: positive, and never so steep that an inner step runs away."""
    return F.softplus(x) / math.log(2)


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """Of normal distributions from the standard one, the mean over all dimensions."""
    return (0.5 * (mean.square() + std.square() - 1) - std.log()).mean()


def correlation(rows: Tensor) -> Tensor:
    """Mean squared difference of the rows' correlations (r, n) from none, the identity (eq. 7)."""
    rows = F.normalize(rows, dim=1)
    identity = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return (rows @ rows.T - identity).square().mean()
