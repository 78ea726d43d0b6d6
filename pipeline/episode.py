"""Episode and Images: the one place that defines the shapes of a batch. Floor 0."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from pipeline.annotations import Measure

Classifier = Callable[[Tensor], Tensor]
"""Images (m, C, H, W) to logits (m, n_way), or to real values (m, n_way)."""


class Episode(NamedTuple):
    """One task, or a meta-batch of tasks with a leading tasks axis on every tensor.

    Images are uint8 as the loader yields them and float once they are on the device. In a task of
    regression an image is one pixel, the argument of a function, and its target the value: y is
    (m, 1) float and n_way is 1.

    Attributes:
        support_x: (n_way*k_shot, C, H, W) labelled images.
        support_y: (n_way*k_shot,) int64, classes 0..n_way-1 of this task.
        query_x: (n_way*n_query, C, H, W) images to classify.
        query_y: (n_way*n_query,) int64.
        id: () int64, the episode's index in its stream; stays on the CPU.
        n_way: the same for all tasks of a meta-batch; a number, so that no device is asked.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    id: Tensor
    n_way: int

    def each(self, function: Callable[[Tensor], Tensor]) -> "Episode":
        """The function of every tensor."""
        return Episode(
            function(self.support_x),
            function(self.support_y),
            function(self.query_x),
            function(self.query_y),
            function(self.id),
            self.n_way,
        )

    @property
    def measure(self) -> Measure:
        """What predictions are scored by."""
        return "mse" if self.query_y.is_floating_point() else "acc"

    def tasks(self) -> "list[Episode]":
        """The tasks of a meta-batch, each without the tasks axis."""
        return [self.part(i) for i in range(len(self.id))]

    def part(self, tasks: int | slice) -> "Episode":
        """One task of a meta-batch, or some with their tasks axis."""
        return self.each(lambda field: field[tasks])


class Images(NamedTuple):
    """A batch of images of all training classes, for learners that train an ordinary classifier.

    Attributes:
        x: (b, C, H, W), uint8 as the loader yields them and float once they are on the device.
        y: (b,) int64, position of the class among those of the training split.
        id: (b,) int64, index of each image in its stream; stays on the CPU.
    """

    x: Tensor
    y: Tensor
    id: Tensor

    @property
    def measure(self) -> Measure:
        """What predictions are scored by."""
        return "acc"

    def each(self, function: Callable[[Tensor], Tensor]) -> "Images":
        """The function of every tensor."""
        return Images(*map(function, self))


Batch = Episode | Images
"""What a step of training is over."""
