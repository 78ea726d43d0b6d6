"""Metrics over episodes. Floor 1."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pipeline.annotations import Measure
from pipeline.functional import mean_ci95


class EpisodeMean(Metric):
    """Mean score over episodes with its 95 % interval; gathers over processes.

    The unit of sampling is the episode, not the image: images of one episode share its classes.
    """

    is_differentiable = False
    full_state_update = False

    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.measure: Measure = "acc"
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, measure: Measure = "acc") -> None:
        """Add the score of one episode () or of several (n,)."""
        self.measure = measure
        self.values.append(scores.detach().reshape(-1))

    def compute(self) -> dict[str, Tensor]:
        """`acc` and `acc_ci95`, or the same of another measure, both ()."""
        mean, ci95 = mean_ci95(dim_zero_cat(self.values))
        device = self.device
        return {
            self.measure: torch.tensor(mean, device=device),
            f"{self.measure}_ci95": torch.tensor(ci95, device=device),
        }
