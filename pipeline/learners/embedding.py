"""EmbeddingLearner: one network embeds, a head on embeddings classifies. Floor 3."""

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.blocks import is_transductive
from pipeline.data.datamodule import EpisodicDataModule
from pipeline.episode import Classifier, Episode
from pipeline.functional import Loss, count_ways
from pipeline.heads.base import Head
from pipeline.learners.base import MetaLearner, OptimizerFactory, SchedulerFactory

EMBED_BATCH = 256  # images, where no gradient is wanted
SOLVED = 2**23  # numbers in the systems that heads solve at a time, (n_way, m, m) a task
BASE_IMAGES = 2048  # training images whose mean embedding stands for that of all


class EmbeddingLearner(MetaLearner):
    """A learner whose `adapt` is `embed` followed by a `head`.

    With an inductive backbone an image's embedding does not depend on its episode, so a whole
    split can be embedded once and thousands of episodes become gathers (see `evaluation`). A
    learner gives `head`, for one task, or `heads`, for many: each is written by the other.

    Attributes:
        task_head: of conf/head, if that is what `head` calls.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerFactory | None,
        scheduler: SchedulerFactory | None,
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__(optimizer, scheduler, loss)
        self.backbone = backbone
        self.task_head: Head | None = None

    @property
    def protocol(self) -> str:
        """See `MetaLearner.protocol`; a head of conf/head may look at all queries too."""
        looks = self.task_head is not None and self.task_head.transductive
        return "transductive" if looks else super().protocol

    def embed(self, x: Tensor) -> Tensor:
        """Images (m, C, H, W) -> embeddings (m, d)."""
        return self.backbone(x)

    def head(self, support_z: Tensor, support_y: Tensor, n_way: int) -> Classifier:
        """Turn support embeddings (m, d) into a classifier of query embeddings (q, d).

        Written for one task in tensor operations alone, as `heads` runs it under `vmap`.

        Args:
            support_z: (m, d).
            support_y: (m,), classes 0..n_way-1, each present.
            n_way: number of classes.
        """
        z, y = support_z.unsqueeze(0), support_y.unsqueeze(0)
        return lambda query_z: self.heads(z, y, query_z.unsqueeze(0), n_way).squeeze(0)

    def heads(self, support_z: Tensor, support_y: Tensor, query_z: Tensor, n_way: int) -> Tensor:
        """`head` of many tasks at once: (t, m, d), (t, m), (t, q, d) -> logits (t, q, n_way)."""
        size = max(1, SOLVED // (n_way * support_y.shape[1] ** 2))
        head = torch.vmap(lambda z, y, q: self.head(z, y, n_way)(q), chunk_size=size)
        return head(support_z, support_y, query_z)

    @property
    def embeds_once(self) -> bool:
        """Whether images may be embedded apart from their episodes, and `head` does the rest."""
        return not is_transductive(self) and type(self).adapt is EmbeddingLearner.adapt

    def compile_networks(self) -> None:
        """See `MetaLearner.compile_networks`."""
        self.backbone.compile()

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Classifier:
        """See `MetaLearner.adapt`."""
        n_way = count_ways(support_y)
        self.check_ways(n_way)
        classify = self.head(self.embed(support_x), support_y, n_way)
        return lambda query_x: classify(self.embed(query_x))

    def embed_tasks(self, batch: Episode) -> tuple[Tensor, Tensor]:
        """Embeddings of a meta-batch, (tasks, s, d) and (tasks, q, d): as `adapt` makes them.

        All images pass through the network at once where that is the same.
        """
        tasks, n_support = batch.support_y.shape
        if not self.embeds_once:
            pairs = [(self.embed(t.support_x), self.embed(t.query_x)) for t in batch.tasks()]
            support_z, query_z = map(torch.stack, zip(*pairs, strict=True))
            return support_z, query_z
        images = torch.cat([batch.support_x, batch.query_x], dim=1)  # (tasks, s+q, C, H, W)
        flat = images.flatten(0, 1)
        parts = [flat] if self.training else flat.split(EMBED_BATCH)  # no norm sees its batch then
        z = torch.cat([self.embed(part) for part in parts]).unflatten(0, (tasks, -1))
        return z[:, :n_support], z[:, n_support:]

    def predict(self, batch: Episode) -> Tensor:
        """Embeds all images of the meta-batch in one pass where that is the same."""
        if not self.embeds_once:
            return super().predict(batch)
        support_z, query_z = self.embed_tasks(batch)
        return self.heads(support_z, batch.support_y, query_z, batch.n_way)


@torch.no_grad()
def base_mean(learner: EmbeddingLearner, data: EpisodicDataModule) -> Tensor:
    """(d,) mean embedding of up to `BASE_IMAGES` training images, evenly spread over the pool."""
    was_training = learner.training
    learner.eval()
    images = np.flatnonzero(np.isin(data.pool.labels, data.classes("train")))
    spread = np.linspace(0, len(images) - 1, min(BASE_IMAGES, len(images)))
    chosen = torch.from_numpy(images[spread.astype(np.int64)])
    parts = (data.prepare(data.images(c, learner.device)) for c in chosen.split(EMBED_BATCH))
    mean = torch.cat([learner.embed(part) for part in parts]).mean(0)
    learner.train(was_training)
    return mean
