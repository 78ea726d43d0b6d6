"""SNAIL: a simple neural attentive meta-learner. Mishra et al. 2018.

https://arxiv.org/abs/1707.03141.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.annotations import PositiveInt, ShotsRange, Ways
from pipeline.backbones import out_dim
from pipeline.engine import chunks
from pipeline.functional import Loss, canonical_order
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.embedding import EmbeddingLearner

CELLS = 2**25  # numbers in the features computed at a time in evaluation, 128 MiB


class Snail(EmbeddingLearner):
    """A causal network reads the labelled support set as a sequence, then a query without label.

    Attention and temporal convolutions take turns, as in the paper's few-shot networks. As the
    query comes last, nothing in the support set depends on it: the sequences of all queries of a
    task share one pass over the support set, with the same result as one pass a query. It is read
    class after class (`canonical_order`), where the paper shuffles it.

    Args:
        n_way: length of the one-hot label; this learner takes tasks of exactly that many classes.
        filters: of a convolution; 128 in the paper.
        shots: of training, a number or a range: the convolutions reach back over the longest
            sequence of so many images a class; attention sees all of a longer one too.
    """

    n_way: int

    def __init__(
        self,
        backbone: nn.Module,
        n_way: Ways,
        filters: PositiveInt,
        shots: ShotsRange,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__(backbone, optimizer, scheduler, loss)
        self.n_way = n_way
        d = out_dim(backbone)
        channels = d + n_way
        length = n_way * (shots if isinstance(shots, int) else max(shots)) + 1
        self.blocks = nn.ModuleList()
        for keys, values in ((64, 32), (256, 128), (512, 256)):
            if self.blocks:
                for dilation in dilations(length):
                    self.blocks.append(DenseBlock(channels, filters, dilation))
                    channels += filters
            self.blocks.append(AttentionBlock(channels, keys, values))
            channels += values
        self.classify = nn.Linear(channels, n_way)

    @property
    def label(self) -> str:
        """As papers write it."""
        return "SNAIL"

    def heads(self, support_z: Tensor, support_y: Tensor, query_z: Tensor, n_way: int) -> Tensor:
        """Each query at the end of its own sequence; see `EmbeddingLearner.heads`."""
        self.check_ways(n_way)
        tokens = support_z.shape[1] + query_z.shape[1]
        size = max(1, CELLS // (tokens * self.classify.in_features))
        parts = chunks(len(query_z), size)
        return torch.cat([self._logits(support_z[p], support_y[p], query_z[p]) for p in parts])

    def _logits(self, support_z: Tensor, support_y: Tensor, query_z: Tensor) -> Tensor:
        """(t, m, d), (t, m), (t, q, d) -> (t, q, n_way)."""
        order = canonical_order(support_z, support_y)  # a sequence has an order, a set has not
        support_z = support_z.gather(1, order.unsqueeze(2).expand_as(support_z))
        label = F.one_hot(support_y.gather(1, order), self.n_way).to(support_z.dtype)
        support = torch.cat([support_z, label], 2)  # (t, m, d+n_way)
        query = F.pad(query_z, (0, self.n_way))  # no label
        x, m = torch.cat([support, query], 1), support.shape[1]
        for block in self.blocks:
            x = block(x, m)
        return self.classify(x[:, m:])


def dilations(length: int) -> list[int]:
    """1, 2, 4, ... of as many kernels of two as see `length` steps.

    (The paper's listing begins at 2, from where only every second step would be seen.)
    """
    return [2**i for i in range(math.ceil(math.log2(length)))]


class DenseBlock(nn.Module):
    """Causal convolution of kernel 2 with a gated activation, appended to its input (figure 2a).

    Tokens (t, m+q, c): m of the sequence, then q of which each is its step m+1. The kernel is two
    linear maps, of the step itself and of the one `dilation` before it.
    """

    def __init__(self, channels: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.now = nn.Linear(channels, 2 * filters)
        self.before = nn.Linear(channels, 2 * filters, bias=False)

    def forward(self, x: Tensor, m: int) -> Tensor:
        """(t, m+q, c) -> (t, m+q, c+filters)."""
        before = F.pad(self.before(x[:, :m]), (0, 0, self.dilation, 0))  # zero before the start
        last = before[:, m : m + 1].expand(-1, x.shape[1] - m, -1)
        pre = self.now(x) + torch.cat([before[:, :m], last], 1)  # (t, m+q, 2*filters)
        value, gate = pre.chunk(2, dim=2)
        return torch.cat([x, value.tanh() * gate.sigmoid()], 2)


class AttentionBlock(nn.Module):
    """One head of causal attention, appended to its input (figure 2b); tokens as above.

    Keys and queries start as one map, so that attention starts out as similarity: from two
    unrelated ones, training stays at chance for hundreds of steps.
    """

    def __init__(self, channels: int, keys: int, values: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(channels, keys), nn.Linear(channels, keys)
        self.value = nn.Linear(channels, values)
        nn.init.kaiming_normal_(self.query.weight)
        self.key.load_state_dict(self.query.state_dict())

    def forward(self, x: Tensor, m: int) -> Tensor:
        """(t, m+q, c) -> (t, m+q, c+values)."""
        tokens = x.shape[1]
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        seen[m:, m:] = torch.eye(tokens - m, dtype=torch.bool, device=x.device)
        read = F.scaled_dot_product_attention(
            self.query(x), self.key(x), self.value(x), attn_mask=seen
        )
        return torch.cat([x, read], 2)
