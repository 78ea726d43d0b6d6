"""WithHead: the network of a trained embedding learner under another head. Floor 3."""

import torch
from torch import Tensor

from pipeline.episode import Classifier
from pipeline.heads.base import Head
from pipeline.learners.embedding import EmbeddingLearner

NUMBERS = 2**21  # in the embeddings of the tasks that are adapted to at a time: fits a cache


class WithHead(EmbeddingLearner):
    """Embeds as the learner does, classifies as the head does; not to be trained.

    Any number of classes, whatever the learner was built for.

    Args:
        learner: trained.
        head: what its embeddings are classified by.
        base_mean: (d,), see `embedding.base_mean`; None if the head does without.
        suffix: added to the head's name.
    """

    task_head: Head

    def __init__(
        self, learner: EmbeddingLearner, head: Head, base_mean: Tensor | None, suffix: str = ""
    ) -> None:
        super().__init__(learner.backbone, optimizer=None, scheduler=None)
        self.trained, self.task_head = learner, head
        self.short_label = head.label + suffix
        self.register_buffer("base_mean", base_mean, persistent=False)
        self.requires_grad_(False)

    @property
    def label(self) -> str:
        """Both names."""
        return f"{self.trained.label} + {self.short_label}"

    def embed(self, x: Tensor) -> Tensor:
        """As the trained learner."""
        return self.trained.embed(x)

    def head(self, support_z: Tensor, support_y: Tensor, n_way: int) -> Classifier:
        """See `EmbeddingLearner.head`; the queries must be all those of the task."""
        mean = self.base_mean if self.base_mean is not None else torch.zeros_like(support_z[0])
        return self.task_head(support_z, support_y, n_way, mean)

    def heads(self, support_z: Tensor, support_y: Tensor, query_z: Tensor, n_way: int) -> Tensor:
        """See `EmbeddingLearner.heads`; as many tasks at a time as memory near the processor holds.

        A head may look at every pair of queries, so both count.
        """
        queries, d = query_z.shape[1:]
        size = max(1, NUMBERS // ((support_z.shape[1] + queries) * max(d, queries)))
        stacked = super().heads
        parts = zip(support_z.split(size), support_y.split(size), query_z.split(size), strict=True)
        return torch.cat([stacked(z, y, q, n_way) for z, y, q in parts])
