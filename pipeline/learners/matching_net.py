"""Matching networks. Vinyals, Blundell, Lillicrap, Wierstra 2016, https://arxiv.org/abs/1606.04080."""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor, nn

from pipeline.annotations import PositiveInt
from pipeline.backbones import out_dim
from pipeline.functional import canonical_order
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.embedding import EmbeddingLearner


class MatchingNet(EmbeddingLearner):
    """Classify by attention over the labels of the support set (eq. 1 of the paper).

    Logits are log-probabilities, so that cross-entropy is the paper's negative log-likelihood; no
    other loss is defined on them.

    Args:
        full_context: embed the support set and each query in the light of the support set
            (section 2.1.2 and appendix A); read class after class (`canonical_order`), where the
            paper leaves the order open.
        processing_steps: K of the query's attention LSTM.
        scale: of the cosine before the softmax; 1 is the paper, with which no probability of a
            1-shot task exceeds e^2 / (e^2 + n_way - 1). Beyond 40 a far label would underflow.
    """

    def __init__(
        self,
        backbone: nn.Module,
        full_context: bool,
        processing_steps: PositiveInt,
        scale: Annotated[float, Gt(0), Le(40)],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
    ) -> None:
        super().__init__(backbone, optimizer, scheduler)
        self.processing_steps, self.scale = processing_steps, scale
        self.full_context = full_context
        if full_context:
            d = out_dim(backbone)
            self.support_lstm = nn.LSTM(d, d, batch_first=True, bidirectional=True)
            self.query_cell = nn.LSTMCell(2 * d, d)

    @property
    def label(self) -> str:
        """FCE if embeddings are in full context."""
        return "MatchingNet FCE" if self.full_context else "MatchingNet"

    def heads(self, support_z: Tensor, support_y: Tensor, query_z: Tensor, n_way: int) -> Tensor:
        """Batched by hand, as LSTMs have no rule for vmap; see `EmbeddingLearner.heads`."""
        if self.full_context:
            order = canonical_order(support_z, support_y)  # a sequence has an order, a set has not
            support_y = support_y.gather(1, order)
            support_z = support_z.gather(1, order.unsqueeze(2).expand_as(support_z))
            support_z = self._embed_support(support_z)
            query_z = self._embed_queries(query_z, support_z)
        return log_attention(support_z, support_y, query_z, n_way, self.scale)

    def _embed_support(self, z: Tensor) -> Tensor:
        """Appendix A.2: g(x, S), the embedding plus both directions of an LSTM over the set.

        Args:
            z: (t, m, d).

        Returns:
            (t, m, d).
        """
        forwards, backwards = self.support_lstm(z)[0].chunk(2, dim=2)  # (t, m, d) each
        return z + forwards + backwards

    def _embed_queries(self, z: Tensor, support: Tensor) -> Tensor:
        """Appendix A.1, eq. 3-6: f(x, S), an LSTM that attends to the support set K times.

        The paper's hidden state [h, r] is h as the cell's state and r as part of its input: the
        same sum of products. It starts with nothing processed: h = z, c = 0.

        Args:
            z: (t, q, d).
            support: (t, m, d), in context.

        Returns:
            (t, q, d); no query sees another.
        """
        x = z.flatten(0, 1)  # (t*q, d)
        hidden, cell = z, torch.zeros_like(x)
        for _ in range(self.processing_steps):
            attention = (hidden @ support.mT).softmax(2)  # (t, q, m), of inner products
            read = (attention @ support).flatten(0, 1)  # (t*q, d)
            state, cell = self.query_cell(torch.cat([x, read], 1), (hidden.flatten(0, 1), cell))
            hidden = state.unflatten(0, z.shape[:2]) + z
        return hidden


def log_attention(
    support_z: Tensor, support_y: Tensor, query_z: Tensor, n_way: int, scale: float
) -> Tensor:
    """Log of each class's share of a softmax over the support set of scaled cosines.

    Args:
        support_z: (t, m, d).
        support_y: (t, m), classes 0..n_way-1.
        query_z: (t, q, d).
        n_way: number of classes.
        scale: at most 40.

    Returns:
        (t, q, n_way) log-probabilities.
    """
    with torch.autocast(query_z.device.type, enabled=False):  # far labels vanish in half precision
        if query_z.dtype != torch.float64:
            support_z, query_z = support_z.float(), query_z.float()
        cosine = F.normalize(query_z, dim=2) @ F.normalize(support_z, dim=2).mT  # (t, q, m)
        label = F.one_hot(support_y, n_way).to(cosine.dtype)  # (t, m, n_way)
        return ((scale * cosine).softmax(2) @ label).log()
