"""Frozen: a network used as it is, under a head. Floor 3."""

from torch import Tensor, nn

from pipeline.annotations import PositiveFloat
from pipeline.episode import Classifier
from pipeline.errors import UserError
from pipeline.heads.base import Head
from pipeline.learners.embedding import EmbeddingLearner


class Frozen(EmbeddingLearner):
    """Nothing is trained: what the backbone's weights know is classified by the head.

    Args:
        backbone: embeds images; with weights, or its embeddings are random.
        head: classifies by embeddings; it decides the name and the protocol.
        scale: factor of the logits, an inverse temperature: changes no prediction.
    """

    task_head: Head

    def __init__(self, backbone: nn.Module, head: Head, scale: PositiveFloat) -> None:
        super().__init__(backbone, optimizer=None, scheduler=None)
        if head.features == "CL2N":
            raise UserError(
                "learner.head.features: CL2N needs the mean embedding of training images, which a "
                "frozen network has not; allowed are UN, L2N"
            )
        self.task_head, self.scale = head, scale
        self.requires_grad_(False)

    @property
    def label(self) -> str:
        """That it is frozen, and the head's name."""
        return f"Frozen + {self.task_head.label}"

    def head(self, support_z: Tensor, support_y: Tensor, n_way: int) -> Classifier:
        """See `EmbeddingLearner.head`."""
        classify = self.task_head(support_z, support_y, n_way, support_z.new_zeros(()))
        return lambda query_z: self.scale * classify(query_z)
