"""An image of training is a pure function of (seed, split, index), as an episode is. Floor 1."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from pipeline.data.episodes import gather, random_bits, stream_key
from pipeline.data.pool import ImagePool
from pipeline.episode import Images
from pipeline.errors import UserError


class ImageSampler:
    """(seed, split, index) -> an image: endless passes over all images of a split.

    Image i of the stream is image i % n of pass i // n. A pass holds each of the n images once, in
    an order of its own.

    Args:
        labels: (images of the pool,) class of each.
        classes: ids of the classes that belong to the split; their position is the label.
        seed, split: name the stream.

    Raises:
        UserError: if there are fewer than two classes to tell apart.
    """

    def __init__(self, labels: np.ndarray, classes: Sequence[int], seed: int, split: str) -> None:
        if len(classes) < 2:
            raise UserError(f"images_per_batch: split {split!r} has {len(classes)} classes")
        position = np.full(max(labels.max(), *classes) + 1, -1)
        position[np.asarray(classes)] = np.arange(len(classes))
        self._label = position[labels]
        self._images = np.flatnonzero(self._label >= 0)
        self._key = stream_key(f"{seed}/{split}/images")
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Images in a pass."""
        return len(self._images)

    def sample(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the pool (b,) and their labels (b,), of so many indices."""
        passes, places = np.divmod(np.asarray(indices, dtype=np.int64), len(self))
        chosen = np.empty_like(places)
        for each in np.unique(passes):
            here = passes == each
            chosen[here] = self._order(int(each))[places[here]]
        return chosen, self._label[chosen]

    def _order(self, number: int) -> np.ndarray:
        """The images of a pass; those of the last two are kept, as a batch may lie in both."""
        if number not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k == number - 1}
            shuffled = np.argsort(random_bits(self._key, len(self), stream=number), kind="stable")
            self._orders[number] = self._images[shuffled]
        return self._orders[number]


class ImageDataset(Dataset[Images]):
    """Images of a stream: `dataset[[7, 8]]` is a batch.

    Args:
        pool, sampler: where images and their choice come from.
        indices_only, pin: see `EpisodeDataset`.
    """

    def __init__(
        self,
        pool: ImagePool,
        sampler: ImageSampler,
        indices_only: bool = False,
        pin: bool = False,
    ) -> None:
        self.pool, self.sampler = pool, sampler
        self.indices_only, self.pin = indices_only, pin

    def __getitem__(self, indices: Sequence[int]) -> Images:
        """Images are uint8, gathered in one go."""
        rows, y = self.sampler.sample(indices)
        x = torch.from_numpy(rows) if self.indices_only else gather(self.pool, rows, self.pin)
        return Images(x, torch.from_numpy(y), torch.as_tensor(indices))
