"""Tasks of regression: a family of functions -> episodes, pure in (seed, split, index). Floor 1."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from pipeline.data.episodes import episode_keys, stream_key, uniform
from pipeline.episode import Episode

Function = Callable[[np.ndarray], np.ndarray]
"""From arguments (tasks, m) to values (tasks, m), each row by a function of its own."""


class FunctionFamily(ABC):
    """Functions of one real argument to one real value, one for each key.

    Attributes:
        name: that tables show.
        x_range: the interval that arguments are drawn from.
    """

    name: str
    x_range: tuple[float, float]

    @abstractmethod
    def at(self, keys: np.ndarray) -> Function:
        """The functions of some keys (tasks,) uint64."""

    @property
    def fingerprint(self) -> str:
        """Of the family: the same functions under the same keys."""
        return hashlib.sha256(f"{type(self).__qualname__} {vars(self)}".encode()).hexdigest()


class FunctionEpisodes(Dataset[Episode]):
    """Episodes of a family: `episodes[7]` is one task, `episodes[[7, 8]]` a stacked meta-batch.

    Support sets are nested (five shots are the first of ten) and queries do not depend on the
    number of shots, so that both are compared on the same functions and arguments.

    Args:
        k_shot, n_query: points of a function that are given and asked for.
        seed, split: name the stream.
    """

    def __init__(
        self, family: FunctionFamily, k_shot: int, n_query: int, seed: int, split: str
    ) -> None:
        self.family, self.k_shot, self.n_query = family, k_shot, n_query
        self._stream = stream_key(f"{seed}/{split}")

    def __getitem__(self, index: int | Sequence[int]) -> Episode:
        """Arguments are images of one pixel, (m, 1, 1, 1) float32, targets (m, 1) float32."""
        if isinstance(index, int):
            return self[[index]].tasks()[0]
        keys = episode_keys(self._stream, index)
        function, (low, high) = self.family.at(keys), self.family.x_range
        fields = []
        for points, stream in ((self.k_shot, 1), (self.n_query, 2)):
            x = low + (high - low) * uniform(keys, points, stream)  # (tasks, points)
            x = x.astype(np.float32)  # what learners see is what the target is of
            y = function(x.astype(np.float64)).astype(np.float32)
            fields += [torch.from_numpy(x)[..., None, None, None], torch.from_numpy(y)[..., None]]
        support_x, support_y, query_x, query_y = fields
        return Episode(support_x, support_y, query_x, query_y, torch.as_tensor(index), 1)

    def functions(self, indices: Sequence[int]) -> Function:
        """What the tasks `indices` are about."""
        return self.family.at(episode_keys(self._stream, indices))
