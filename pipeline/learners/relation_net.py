"""Relation networks. Sung et al. 2018, https://arxiv.org/abs/1711.06025."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.annotations import PositiveInt
from pipeline.backbones import out_dim
from pipeline.blocks import Norm, make_norm
from pipeline.engine import chunks
from pipeline.functional import Loss
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.embedding import EmbeddingLearner

CELLS = 2**24  # numbers in the maps of the pairs scored at a time in evaluation, 64 MiB


class RelationNet(EmbeddingLearner):
    """A learned comparison of each query with each class takes the place of a distance.

    The relation module (figure 2 of the paper) is two blocks of 3x3 convolution, norm, ReLU and
    max-pool and two linear layers, over the concatenated maps of a class and a query. Of a
    backbone without maps, or with maps of 1x1, the convolutions are linear layers.

    Args:
        width: of the relation module's blocks; 64 in the paper.
        hidden: of its first linear layer; 8 in the paper.
        norm: of its blocks; that of the backbone, so that both are inductive or neither is.
        class_feature: sum of the support maps of a class, as in the paper, or their mean, the same
            up to a factor while shots are equal and what a test with other shots needs.
        loss: mse is the paper's, of scores between 0 and 1; of other losses they are logits.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: PositiveInt,
        hidden: PositiveInt,
        norm: Norm,
        class_feature: Literal["sum", "mean"],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        loss: Loss = "mse",
    ) -> None:
        super().__init__(backbone, optimizer, scheduler, loss)
        self.class_feature = class_feature
        self.shape: tuple[int, int, int]  # (C, h, w)
        self.shape = getattr(backbone, "out_shape", None) or (out_dim(backbone), 1, 1)
        channels, size, _ = self.shape
        half, quarter = max(1, size // 2), max(1, size // 4)
        bias = norm not in ("batch", "batch_stats")  # which would take it away
        self.compare = _convolution(2 * channels, width, size, bias)
        self.score = nn.Sequential(
            *(make_norm(norm, width), _pool(size), nn.ReLU()),
            _convolution(width, width, half, bias),
            *(make_norm(norm, width), _pool(half), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(width * quarter**2, hidden), nn.ReLU()),
            nn.Linear(hidden, 1),
        )
        self.to(memory_format=torch.channels_last)

    def heads(self, support_z: Tensor, support_y: Tensor, query_z: Tensor, n_way: int) -> Tensor:
        """Relation scores; see `EmbeddingLearner.heads`."""
        if self.training:  # the norm's statistics are of all pairs
            return self._scores(support_z, support_y, query_z, n_way)
        pairs = query_z.shape[1] * n_way
        cells = pairs * self.compare.out_channels * self.shape[1] * self.shape[2]  # of a task
        parts = chunks(len(query_z), max(1, CELLS // cells))
        return torch.cat(
            [self._scores(support_z[p], support_y[p], query_z[p], n_way) for p in parts]
        )

    def _scores(self, support_z: Tensor, support_y: Tensor, query_z: Tensor, n_way: int) -> Tensor:
        """(t, m, d), (t, m), (t, q, d) -> (t, q, n_way)."""
        tasks, queries, _ = query_z.shape
        member = F.one_hot(support_y, n_way).to(support_z.dtype)  # (t, m, n_way)
        classes = member.mT @ support_z  # (t, n_way, d)
        if self.class_feature == "mean":
            classes = classes / member.sum(1).unsqueeze(2)
        # A convolution of concatenated maps is the sum of two: n_way + q of them, not n_way * q.
        of_class, of_query = self.compare.weight.chunk(2, dim=1)  # (width, C, k, k) each
        padding = self.compare.kernel_size[0] // 2
        a = F.conv2d(self._maps(classes), of_class, self.compare.bias, padding=padding)
        b = F.conv2d(self._maps(query_z), of_query, padding=padding)
        a, b = a.unflatten(0, (tasks, 1, n_way)), b.unflatten(0, (tasks, queries, 1))
        pairs = (a + b).flatten(0, 2)  # (t*q*n_way, width, h, w)
        scores = self.score(pairs.contiguous(memory_format=torch.channels_last))
        scores = scores.view(tasks, queries, n_way)
        return scores.sigmoid() if self.loss_name == "mse" else scores

    def _maps(self, z: Tensor) -> Tensor:
        """(t, m, d) -> (t*m, C, h, w)."""
        return z.flatten(0, 1).unflatten(1, self.shape)


def _convolution(channels: int, width: int, size: int, bias: bool) -> nn.Conv2d:
    kernel = 3 if size > 1 else 1  # of a single pixel the rest of the kernel sees padding only
    return nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=bias)


def _pool(size: int) -> nn.Module:
    return nn.MaxPool2d(2) if size > 1 else nn.Identity()
