"""Transfer: pre-train a classifier of all training classes, then fit a head to each task.

Baseline and Baseline++ (Chen, Liu, Kira, Wang, Huang 2019, https://arxiv.org/abs/1904.04232),
SimpleShot (Wang et al. 2019, https://arxiv.org/abs/1911.04623) and the like differ in classifier
and head alone.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pipeline.annotations import PositiveFloat, Probability, Ways
from pipeline.backbones import out_dim
from pipeline.episode import Classifier, Images
from pipeline.heads.base import Head
from pipeline.learners.base import OptimizerFactory, SchedulerFactory, TrainsOn
from pipeline.learners.embedding import EmbeddingLearner, base_mean


class CosineClassifier(nn.Module):
    """Logits are scaled cosines to a vector of each class (Baseline++).

    The length of a vector is learned apart from its direction (Salimans, Kingma 2016), as in the
    authors' code: logit = scale * length * cos.
    """

    def __init__(self, dim: int, classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.vectors = weight_norm(nn.Linear(dim, classes, bias=False))

    def forward(self, z: Tensor) -> Tensor:
        """(m, d) -> (m, classes)."""
        return self.scale * self.vectors(F.normalize(z, dim=1))


class Transfer(EmbeddingLearner):
    """Trains on batches of images; what it has learned of them is used by a head for each task.

    Args:
        backbone: embeds images.
        n_train_classes: outputs of the classifier; None makes none, for a learner that is used and
            not trained. (Training puts the number of the data in place of None.)
        classifier: what training descends through, "linear" or "cosine".
        scale: of the cosine classifier's logits; the authors' code has 2 up to 200 classes, else
            10.
        label_smoothing: share of the target that is spread over all classes.
        head: classifies by embeddings; it decides the name and, if it sees the queries of a task
            together, the protocol.
    """

    trains_on: ClassVar[TrainsOn] = "images"
    task_head: Head
    base_mean: Tensor
    """(d,) mean embedding of training images, as of the last validation."""

    def __init__(
        self,
        backbone: nn.Module,
        n_train_classes: Ways | None,
        classifier: Literal["linear", "cosine"],
        scale: PositiveFloat,
        label_smoothing: Probability,
        head: Head,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
    ) -> None:
        super().__init__(backbone, optimizer, scheduler)
        dim = out_dim(backbone)
        self.classifier: nn.Module | None = None
        if n_train_classes and classifier == "linear":
            self.classifier = nn.Linear(dim, n_train_classes)
        elif n_train_classes:
            self.classifier = CosineClassifier(dim, n_train_classes, scale)
        self.label_smoothing, self.task_head = label_smoothing, head
        self.register_buffer("base_mean", torch.zeros(dim))

    @property
    def label(self) -> str:
        """The head's name."""
        return self.task_head.label

    def head(self, support_z: Tensor, support_y: Tensor, n_way: int) -> Classifier:
        """See `EmbeddingLearner.head`."""
        classify: Classifier = self.task_head(support_z, support_y, n_way, self.base_mean)
        return classify

    def meta_loss(self, batch: Images) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]  # trains_on images: never given an episode
        """Cross-entropy of the classifier; see `MetaLearner.meta_loss`."""
        assert self.classifier is not None, "made without training classes"
        logits = self.classifier(self.embed(batch.x))  # (b, n_train_classes)
        loss = F.cross_entropy(logits, batch.y, label_smoothing=self.label_smoothing)
        return loss, loss.detach(), (logits.argmax(1) == batch.y).float().mean()

    def on_validation_epoch_start(self) -> None:
        """Measure the base mean, which a checkpoint of this validation holds."""
        self.base_mean.copy_(base_mean(self, self.trainer.datamodule))  # type: ignore[attr-defined]  # Trainer.fit sets it, untyped
