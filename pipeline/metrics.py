"""Metrics over episodes. Floor 1."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pipeline.functional import mean_ci95


class EpisodeAccuracy(Metric):
    """Mean accuracy over episodes with its 95 % interval; gathers over processes.

    The unit of sampling is the episode, not the image: images of one episode share its classes.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, accuracy: Tensor) -> None:
        """Add the accuracy of one episode () or of several (n,)."""
        self.values.append(accuracy.detach().reshape(-1))

    def compute(self) -> dict[str, Tensor]:
        """`acc` and `acc_ci95`, both () in 0..1."""
        mean, ci95 = mean_ci95(dim_zero_cat(self.values))
        device = self.device
        return {
            "acc": torch.tensor(mean, device=device),
            "acc_ci95": torch.tensor(ci95, device=device),
        }
