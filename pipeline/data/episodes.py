"""An episode is a pure function of (seed, split, index). Floor 1.

No global random state takes part: every random number is a hash of what it is for, so episodes do
not depend on workers, order, process count, platform or library version.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.data.pool import ImagePool
from pipeline.episode import Batch, Episode
from pipeline.errors import UserError

Range = int | tuple[int, int]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def random_bits(key: np.ndarray, n: int, stream: int) -> np.ndarray:
    """Counter-based random numbers: SplitMix64 (Steele, Lea, Flood 2014) of key and counter.

    Args:
        key: (...) uint64.
        n: numbers wanted for each key.
        stream: numbers of different streams are independent.

    Returns:
        (..., n) uint64.
    """
    counter = np.arange(n, dtype=np.uint64) + np.uint64((stream << 32) + 1)
    with np.errstate(over="ignore"):
        return _mix(_mix(key)[..., None] + counter * _GOLDEN)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_key(name: str) -> np.ndarray:
    """The key of a stream of random numbers, from its name: () uint64."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.frombuffer(digest[:8], dtype="<u8").astype(np.uint64).reshape(())


def choose_distinct(key: np.ndarray, population: np.ndarray, m: int, stream: int) -> np.ndarray:
    """M distinct numbers out of 0..population-1 for each key, in random order.

    Floyd's sampling (Bentley, Floyd 1987) costs m steps whatever the population; it yields a
    uniform subset but not a uniform order, so a sort by further random numbers follows.

    Args:
        key: (...) uint64.
        population: (...) integers, each at least m.

    Returns:
        (..., m) int64.
    """
    bits = random_bits(key, 2 * m, stream)
    chosen = np.empty((*key.shape, m), dtype=np.int64)
    for i in range(m):
        last = population - m + i
        draw = (bits[..., i] % (last + 1).astype(np.uint64)).astype(np.int64)
        taken = (chosen[..., :i] == draw[..., None]).any(-1)
        chosen[..., i] = np.where(taken, last, draw)
    return np.take_along_axis(chosen, np.argsort(bits[..., m:], axis=-1), axis=-1)


def uniform(key: np.ndarray, n: int, stream: int) -> np.ndarray:
    """Numbers of [0, 1) for each key, from `random_bits`: (...) -> (..., n) float64."""
    return (random_bits(key, n, stream) >> np.uint64(11)) * 2.0**-53


def episode_keys(stream: np.ndarray, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """The key of each episode of a stream, itself a `stream_key`: (tasks,) uint64."""
    with np.errstate(over="ignore"):
        return _mix(stream + np.asarray(indices, dtype=np.uint64) * _GOLDEN)


class EpisodeIndices(NamedTuple):
    """Which images make up a meta-batch of tasks.

    Attributes:
        support: (tasks, n_way, k_shot) image indices into the pool.
        query: (tasks, n_way, n_query) image indices, none of which is in `support`.
        classes: (tasks, n_way) class ids of the pool; their position is the label in the task.
    """

    support: np.ndarray
    query: np.ndarray
    classes: np.ndarray


class EpisodeSampler:
    """(seed, split, index) -> image indices, for many indices at a time.

    Args:
        labels: (n,) class of each image of the pool.
        classes: ids of the classes that belong to the split.
        class_names: of the pool, for messages.
        n_way, k_shot: a number, or an inclusive range from which a shape is drawn.
        n_query: query images of each class.
        seed, split: name the stream.
        tasks_per_shape: that many consecutive episodes share one drawn shape, so that a meta-batch
            can be stacked.

    Raises:
        UserError: if the split has too few classes or its smallest class too few images.
    """

    def __init__(
        self,
        labels: np.ndarray,
        classes: Sequence[int],
        class_names: Sequence[str],
        n_way: Range,
        k_shot: Range,
        n_query: int,
        seed: int,
        split: str,
        tasks_per_shape: int = 1,
    ) -> None:
        self.classes = np.asarray(classes, dtype=np.int64)
        self.n_way, self.k_shot, self.n_query = _bounds(n_way), _bounds(k_shot), n_query
        self.tasks_per_shape = tasks_per_shape
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], self.classes, side="left")
        ends = np.searchsorted(labels[order], self.classes, side="right")
        self._order, self._starts, self._sizes = order, starts, ends - starts
        self._key = stream_key(f"{seed}/{split}")
        self._check(split, class_names)

    def _check(self, split: str, class_names: Sequence[str]) -> None:
        ways, need = self.n_way[1], self.k_shot[1] + self.n_query
        if ways > len(self.classes):
            raise UserError(
                f"n_way: {ways} classes a task, but split {split!r} has {len(self.classes)}"
            )
        smallest = int(np.argmin(self._sizes))
        if need > self._sizes[smallest]:
            raise UserError(
                f"k_shot + n_query: {self.k_shot[1]} + {self.n_query} images of a class, but class "
                f"{class_names[self.classes[smallest]]!r} of split {split!r} has "
                f"{self._sizes[smallest]}"
            )

    def shape(self, index: int) -> tuple[int, int]:
        """(n_way, k_shot) of the episode `index`."""
        group = np.uint64(index // self.tasks_per_shape)
        with np.errstate(over="ignore"):
            bits = random_bits(np.asarray(self._key + group * _GOLDEN), 2, stream=0)
        spans = (self.n_way, self.k_shot)
        n_way, k_shot = (
            lo + int(b) % (hi - lo + 1) for (lo, hi), b in zip(spans, bits, strict=True)
        )
        return n_way, k_shot

    def sample(self, indices: Sequence[int] | np.ndarray) -> EpisodeIndices:
        """Image indices of the episodes `indices`, stacked.

        Raises:
            ValueError: if the episodes differ in shape.
        """
        ids = np.asarray(indices, dtype=np.uint64)
        groups = ids // np.uint64(self.tasks_per_shape)
        shapes = {self.shape(int(group) * self.tasks_per_shape) for group in np.unique(groups)}
        if len(shapes) != 1:
            raise ValueError(f"episodes of different shapes cannot be stacked: {sorted(shapes)}")
        n_way, k_shot = shapes.pop()
        key = episode_keys(self._key, ids)  # (tasks,)
        population = np.full(len(ids), len(self.classes))
        ways = choose_distinct(key, population, n_way, stream=1)  # (tasks, n_way)
        class_key = random_bits(key, n_way, stream=2)  # one key a task and label
        members = choose_distinct(class_key, self._sizes[ways], k_shot + self.n_query, stream=3)
        images = self._order[self._starts[ways][..., None] + members]  # (tasks, n_way, k+q)
        return EpisodeIndices(images[..., :k_shot], images[..., k_shot:], self.classes[ways])


class EpisodeDataset(Dataset[Episode]):
    """Episodes of a pool: `dataset[7]` is one task, `dataset[[7, 8]]` a stacked meta-batch.

    Args:
        pool, sampler: where images and their choice come from.
        indices_only: leave out the images: `support_x` and `query_x` are then (m,) int64 rows of
            the pool, for a pool that lies on the device.
        pin: gather straight into page-locked memory, from which CUDA copies without waiting.
    """

    def __init__(
        self,
        pool: ImagePool,
        sampler: EpisodeSampler,
        indices_only: bool = False,
        pin: bool = False,
    ) -> None:
        self.pool, self.sampler = pool, sampler
        self.indices_only, self.pin = indices_only, pin

    def __getitem__(self, index: int | Sequence[int]) -> Episode:
        """Images are uint8, gathered in one go."""
        if isinstance(index, int):
            return self[[index]].tasks()[0]
        chosen = self.sampler.sample(index)
        support, query = self._gather(chosen.support), self._gather(chosen.query)
        return Episode(*support, *query, torch.as_tensor(index), chosen.classes.shape[1])

    def _gather(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        tasks, n_way, each = images.shape
        flat = images.reshape(tasks, n_way * each)  # (tasks, n_way*each), class-major
        y = torch.arange(n_way).repeat_interleave(each).repeat(tasks, 1)  # (tasks, n_way*each)
        if self.indices_only:
            return torch.from_numpy(flat), y
        return gather(self.pool, flat, self.pin), y


def gather(pool: ImagePool, rows: np.ndarray, pin: bool) -> Tensor:
    """Images of a pool in one go: (...) -> (..., C, H, W) uint8."""
    x = torch.empty((*rows.shape, *pool.image_shape), dtype=torch.uint8, pin_memory=pin)
    np.take(pool.images, rows, axis=0, out=x.numpy(), mode="clip")  # unbuffered
    return x


class EpisodeBatches:
    """Lists of indices, of episodes or of images: a stream cut into epochs and dealt to processes.

    Rank r of R takes the indices r, r+R, ... in as many batches as every other rank, as processes
    wait for each other at each batch.

    Args:
        batch_size: most of them in a batch of one process.
        episodes: how many in an epoch, over all processes.
        rank: of this process.
        world: number of processes.
        first: asked at each epoch for the index it begins with. Training answers with the number
            seen so far, so a resumed run sees the very episodes it would have seen; without an
            answer every epoch is the same.
    """

    def __init__(
        self,
        batch_size: int,
        episodes: int,
        rank: int = 0,
        world: int = 1,
        first: Callable[[], int] = lambda: 0,
    ) -> None:
        self.batch_size, self.episodes = batch_size, episodes
        self.rank, self.world, self.first = rank, world, first

    def __len__(self) -> int:
        most = -(-self.episodes // self.world)
        return -(-most // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first()
        mine = range(first + self.rank, first + self.episodes, self.world)
        ends = [-(-len(mine) * i // len(self)) for i in range(len(self) + 1)]
        for start, end in pairwise(ends):
            yield list(mine[start:end])


class Prefetched:
    """Yields what a loader yields, while a thread makes the next item."""

    def __init__(self, loader: DataLoader[Batch]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        items = iter(self.loader)
        with ThreadPoolExecutor(1, "prefetch") as thread:
            following = thread.submit(next, items, None)
            while (item := following.result()) is not None:
                following = thread.submit(next, items, None)
                yield item


def _bounds(value: Range) -> tuple[int, int]:
    low, high = (value, value) if isinstance(value, int) else value
    if low > high:
        raise UserError(f"n_way/k_shot: range {[low, high]} is empty; give [low, high]")
    return low, high
