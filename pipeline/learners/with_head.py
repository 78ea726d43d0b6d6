"""WithHead: the network of a trained embedding learner under another head. Floor 3."""

import numpy as np
import torch
from torch import Tensor

from pipeline.data.datamodule import EpisodicDataModule
from pipeline.episode import Classifier
from pipeline.heads.base import Head
from pipeline.learners.embedding import EMBED_BATCH, EmbeddingLearner

BASE_SAMPLE = 2048  # training images whose mean embedding stands for that of all
NUMBERS = 2**21  # in the embeddings of the tasks that are adapted to at a time: fits a cache


class WithHead(EmbeddingLearner):
    """Embeds as the learner does, classifies as the head does; not to be trained.

    Args:
        learner: trained.
        head: what its embeddings are classified by.
        base_mean: (d,), from `base_mean`.
        suffix: added to the name that tables show.
    """

    def __init__(
        self, learner: EmbeddingLearner, head: Head, base_mean: Tensor, suffix: str = ""
    ) -> None:
        super().__init__(learner.backbone, optimizer=None, scheduler=None)
        self.trained, self.top, self.suffix = learner, head, suffix
        self.register_buffer("base_mean", base_mean, persistent=False)
        self.requires_grad_(False)

    @property
    def label(self) -> str:
        """Both names."""
        return f"{self.trained.label} + {self.top.label}{self.suffix}"

    @property
    def protocol(self) -> str:
        """Transductive if the head or a norm of the network is."""
        return "transductive" if self.top.transductive else super().protocol

    def embed(self, x: Tensor) -> Tensor:
        """As the trained learner."""
        return self.trained.embed(x)

    def head(self, support_z: Tensor, support_y: Tensor, n_way: int) -> Classifier:
        """See `EmbeddingLearner.head`; the queries must be all those of the task."""
        return self.top(support_z, support_y, n_way, self.base_mean)

    def heads(self, support_z: Tensor, support_y: Tensor, query_z: Tensor, n_way: int) -> Tensor:
        """See `EmbeddingLearner.heads`; as many tasks at a time as memory near the processor holds.

        A head may look at every pair of queries, so both count.
        """
        queries, d = query_z.shape[1:]
        size = max(1, NUMBERS // ((support_z.shape[1] + queries) * max(d, queries)))
        parts = zip(*(x.split(size) for x in (support_z, support_y, query_z)), strict=True)
        stacked = super().heads
        return torch.cat([stacked(*part, n_way) for part in parts])


@torch.no_grad()
def base_mean(learner: EmbeddingLearner, data: EpisodicDataModule) -> Tensor:
    """(d,) mean embedding of up to `BASE_SAMPLE` training images, evenly spread over the pool."""
    was_training = learner.training
    learner.eval()
    images = np.flatnonzero(np.isin(data.pool.labels, data.classes("train")))
    spread = np.linspace(0, len(images) - 1, min(BASE_SAMPLE, len(images)))
    chosen = torch.from_numpy(images[spread.astype(np.int64)])
    parts = (data.prepare(data.images(c, learner.device)) for c in chosen.split(EMBED_BATCH))
    mean = torch.cat([learner.embed(part) for part in parts]).mean(0)
    learner.train(was_training)
    return mean
