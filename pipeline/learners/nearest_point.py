"""NearestPoint: the value at the nearest known point, the floor of regression."""

from typing import ClassVar

import torch
from torch import Tensor

from pipeline.episode import Classifier
from pipeline.learners.base import MetaLearner


class NearestPoint(MetaLearner):
    """Untrained, no setting: nearest neighbour on raw arguments (Cover, Hart 1967).

    Of sinusoids it is closer than the mean of the support targets, or zero, at five points and at
    ten.
    """

    regresses: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(optimizer=None, scheduler=None, loss="mse")

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Classifier:
        """Remember the support set."""
        known = support_x.flatten(1)
        return lambda x: support_y[torch.cdist(x.flatten(1), known).argmin(1)]
