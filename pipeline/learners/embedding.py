"""EmbeddingLearner: one network embeds, a head on embeddings classifies. Floor 3."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.episode import Classifier, Episode
from pipeline.functional import accuracy
from pipeline.learners.base import MetaLearner, OptimizerFactory, SchedulerFactory


class EmbeddingLearner(MetaLearner):
    """A learner whose `adapt` is `embed` followed by a `head`.

    With an inductive backbone an image's embedding does not depend on its episode, so a whole
    split can be embedded once and thousands of episodes become gathers (see `evaluation`).
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerFactory | None,
        scheduler: SchedulerFactory | None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.backbone = backbone

    def embed(self, x: Tensor) -> Tensor:
        """Images (m, C, H, W) -> embeddings (m, d)."""
        return self.backbone(x)

    @abstractmethod
    def head(self, support_z: Tensor, support_y: Tensor) -> Classifier:
        """Turn support embeddings (m, d) into a classifier of query embeddings (q, d).

        Raises:
            ValueError: if a class of 0..n_way-1 has no support image.
        """

    @property
    def embeds_once(self) -> bool:
        """Whether images may be embedded apart from their episodes, and `head` does the rest."""
        return self.protocol == "inductive" and type(self).adapt is EmbeddingLearner.adapt

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Classifier:
        """See `MetaLearner.adapt`."""
        classify = self.head(self.embed(support_x), support_y)
        return lambda query_x: classify(self.embed(query_x))

    def meta_loss(self, batch: Episode) -> tuple[Tensor, Tensor, Tensor]:
        """Embeds all images of the meta-batch in one pass, then classifies task by task."""
        if not self.embeds_once:
            return super().meta_loss(batch)
        images = torch.cat([batch.support_x, batch.query_x], dim=1)  # (tasks, s+q, C, H, W)
        tasks, n_support = batch.support_y.shape
        z = self.embed(images.flatten(0, 1)).unflatten(0, (tasks, -1))  # (tasks, s+q, d)
        losses, accuracies = [], []
        for i in range(tasks):
            logits = self.head(z[i, :n_support], batch.support_y[i])(z[i, n_support:])
            losses.append(F.cross_entropy(logits, batch.query_y[i]))
            accuracies.append(accuracy(logits, batch.query_y[i]))
        loss = torch.stack(losses).mean()
        return loss, loss.detach(), torch.stack(accuracies).mean()
