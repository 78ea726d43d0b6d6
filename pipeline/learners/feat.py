"""FEAT: few-shot embedding adaptation with a Transformer. Ye et al. 2020.

https://arxiv.org/abs/1812.03664; what it leaves open is as in its code, github.com/Sha-Lab/FEAT.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.annotations import PositiveFloat, Probability
from pipeline.backbones import out_dim
from pipeline.episode import Episode
from pipeline.functional import Loss, accuracy, prototypes, squared_distances
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.embedding import EmbeddingLearner

ATTENTION_DROPOUT = 0.1


class Feat(EmbeddingLearner):
    """Prototypes are adapted to each other by self-attention, then classify by distance.

    The attention's maps have no bias; in the authors' code the last one has.

    Args:
        temperature: the squared distances of queries to prototypes are divided by it.
        contrast: weight of the contrastive term of the training loss (lambda in the paper).
        contrast_temperature: of the distances in that term.
        dropout: of what attention adds.
    """

    def __init__(
        self,
        backbone: nn.Module,
        temperature: PositiveFloat,
        contrast: float,
        contrast_temperature: PositiveFloat,
        dropout: Probability,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__(backbone, optimizer, scheduler, loss)
        self.temperature, self.contrast_temperature = temperature, contrast_temperature
        self.contrast = contrast
        d = out_dim(backbone)
        self.attention = nn.MultiheadAttention(
            d, num_heads=1, dropout=ATTENTION_DROPOUT, bias=False, batch_first=True
        )
        nn.init.normal_(self.attention.in_proj_weight, std=d**-0.5)
        nn.init.xavier_normal_(self.attention.out_proj.weight)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(d)

    def adapt_set(self, z: Tensor) -> Tensor:
        """The set-to-set function: (sets, m, d) -> the same, equivariant to order."""
        read, _ = self.attention(z, z, z, need_weights=False)
        return self.norm(z + self.dropout(read))

    @property
    def label(self) -> str:
        """As papers write it."""
        return "FEAT"

    def heads(self, support_z: Tensor, support_y: Tensor, query_z: Tensor, n_way: int) -> Tensor:
        """Minus the squared distances to the adapted prototypes; see `EmbeddingLearner.heads`."""
        means = torch.vmap(lambda z, y: prototypes(z, y, n_way))(support_z, support_y)
        return self._logits(query_z, self.adapt_set(means), self.temperature)

    def meta_loss(self, batch: Episode) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the queries plus the contrastive term; see `MetaLearner.meta_loss`."""
        support_z, query_z = self.embed_tasks(batch)
        logits = self.heads(support_z, batch.support_y, query_z, batch.n_way)
        loss = self.loss(logits, batch.query_y).mean()
        y = torch.cat([batch.support_y, batch.query_y], 1)
        term = self.contrastive_loss(torch.cat([support_z, query_z], 1), y, batch.n_way)
        right = accuracy(logits, batch.query_y).mean()
        return loss + self.contrast * term, loss.detach(), right

    def contrastive_loss(self, z: Tensor, y: Tensor, n_way: int) -> Tensor:
        """Embeddings of a class, adapted to each other, should have a mean that they are near to.

        Args:
            z: (t, m, d), support and query embeddings.
            y: (t, m), each of n_way classes equally often.
            n_way: number of classes.

        Returns:
            () mean cross-entropy of all embeddings by their distance to these means.
        """
        order = y.argsort(dim=1, stable=True)
        z = z.gather(1, order.unsqueeze(2).expand_as(z))  # sorted by class
        sets = z.unflatten(1, (n_way, -1))  # (t, n_way, m/n_way, d)
        adapted = self.adapt_set(sets.flatten(0, 1)).mean(1)  # (t*n_way, d)
        centres = adapted.unflatten(0, sets.shape[:2])
        logits = self._logits(z, centres, self.contrast_temperature)
        return F.cross_entropy(logits.mT, y.gather(1, order))

    def _logits(self, z: Tensor, centres: Tensor, temperature: float) -> Tensor:
        """(t, q, d), (t, n_way, d) -> (t, q, n_way)."""
        return -torch.vmap(squared_distances)(z, centres) / temperature
