"""Meta-Baseline. Chen, Liu, Xu, Darrell, Wang 2021, https://arxiv.org/abs/2003.04390."""

import torch
from torch import Tensor, nn

from pipeline.annotations import PositiveFloat
from pipeline.episode import Classifier
from pipeline.functional import Loss, prototypes
from pipeline.heads.base import cosine
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.embedding import EmbeddingLearner


class MetaBaseline(EmbeddingLearner):
    """Episodic training of cosine nearest-centroid, from a network that was pre-trained.

    Args:
        backbone: `init_from` names the run whose network it starts as; the paper's is a classifier
            of all training classes (`Transfer`).
        temperature: factor of the cosines to start from; it is learned.
    """

    def __init__(
        self,
        backbone: nn.Module,
        temperature: PositiveFloat,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__(backbone, optimizer, scheduler, loss)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))

    @property
    def label(self) -> str:
        """As the paper has it."""
        return "Meta-Baseline"

    def head(self, support_z: Tensor, support_y: Tensor, n_way: int) -> Classifier:
        """Logits are the cosines to the mean embedding of each class, scaled."""
        centroids = prototypes(support_z, support_y, n_way)  # (n_way, d)
        return lambda query_z: self.temperature * cosine(query_z, centroids)
