"""Head: classifies by the embeddings of a network that stays as it was trained. Floor 1."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.episode import Classifier

Features = Literal["UN", "L2N", "CL2N"]
"""Embeddings as they are, of unit length, or of unit length after the base mean is taken off."""


class Head(nn.Module, ABC):
    """Turns the support embeddings of one task into a classifier of query embeddings.

    Written in tensor operations alone, without a branch on values, as tasks are stacked by vmap.
    A head holds no parameters: what it learns of a task, it learns anew.

    Attributes:
        transductive: whether the logits of a query depend on the other queries, of which the
            classifier is then given all of the task at once.
        features: what is done to embeddings first; only "CL2N" needs the base mean.
    """

    transductive: ClassVar[bool]
    features: Features = "UN"

    @property
    def label(self) -> str:
        """The name that tables show."""
        return type(self).__name__

    @abstractmethod
    def forward(
        self, support_z: Tensor, support_y: Tensor, n_way: int, base_mean: Tensor
    ) -> Classifier:
        """Adapt to one task.

        Args:
            support_z: (m, d).
            support_y: (m,), classes 0..n_way-1, each present, any number of images a class.
            n_way: number of classes.
            base_mean: (d,) mean embedding of training images.

        Returns:
            From query embeddings (q, d), all of the task, to logits (q, n_way).
        """


def prepared(z: Tensor, features: Features, base_mean: Tensor) -> Tensor:
    """Embeddings (m, d) as a head takes them; Wang et al. 2019, section 3."""
    if features == "UN":
        return z
    return F.normalize(z - base_mean if features == "CL2N" else z, dim=1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every row of a to every row of b: (m, d), (n, d) -> (m, n)."""
    with torch.autocast(a.device.type, enabled=False):  # near 1, half precision has ties of 0.004
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
