"""EpisodicDataModule: three class-disjoint splits of an image source -> three loaders. Floor 2."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pipeline.annotations import (
    Measure,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ShotsRange,
    Ways,
    WaysRange,
)
from pipeline.data.episodes import EpisodeDataset, EpisodeSampler, Range
from pipeline.data.loaders import EpisodeLoaders, Split
from pipeline.data.passes import ImageDataset, ImageSampler
from pipeline.data.pool import ImagePool, ImageSource, Splits
from pipeline.data.transforms import Augmentation, to_float
from pipeline.episode import Batch, Episode, Images
from pipeline.errors import UserError


class EpisodicDataModule(EpisodeLoaders):
    """Episodes of a data set; images stay uint8 until `on_after_batch_transfer`.

    Args:
        source: the data set.
        n_way, k_shot, n_query: shape of validation episodes; the test takes its own numbers of
            shots (`scoreboard.make_test_sets`).
        train_n_way, train_k_shot, train_n_query: shape of training episodes; ranges vary it.
        meta_batch_size: tasks in a training step of one process.
        batches_per_epoch: training steps between two validations.
        val_episodes, test_episodes: how many, the same ones every time.
        seed: names the stream of training episodes.
        eval_seed: names those of validation and test, apart from `seed` so that runs which differ
            in seed are scored on the same episodes.
        mean, std: standardise images scaled to 0..1; one number or one a channel.
        augmentation: of training images, or None.
        num_workers: loader processes; 0 gathers in a thread of the main process.
        image_shape: (C, H, W) that images are adapted to; the source's own by default.
        images_per_batch: training steps of one process are over so many images of all training
            classes, in place of episodes; None trains on episodes.
    """

    measure: ClassVar[Measure] = "acc"
    eval_batch = 16
    source: ImageSource

    def __init__(
        self,
        source: ImageSource,
        *,
        n_way: Ways,
        k_shot: PositiveInt,
        n_query: PositiveInt,
        train_n_way: WaysRange,
        train_k_shot: ShotsRange,
        train_n_query: PositiveInt,
        meta_batch_size: PositiveInt,
        batches_per_epoch: PositiveInt,
        val_episodes: PositiveInt,
        test_episodes: PositiveInt,
        seed: NonNegativeInt,
        eval_seed: NonNegativeInt,
        mean: list[float],
        std: list[PositiveFloat],
        augmentation: Augmentation | None,
        num_workers: NonNegativeInt,
        image_shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None,
        images_per_batch: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        self.source = source
        self.n_way, self.k_shot, self.n_query = n_way, k_shot, n_query
        self.train_shape = (_as_range(train_n_way), _as_range(train_k_shot), train_n_query)
        self.meta_batch_size, self.batches_per_epoch = meta_batch_size, batches_per_epoch
        self.images_per_batch = images_per_batch
        self.val_episodes, self.test_episodes = val_episodes, test_episodes
        self.seed, self.eval_seed = seed, eval_seed
        self.mean, self.std = mean, std
        self.augmentation, self.num_workers = augmentation, num_workers
        self._image_shape = image_shape
        self._pool: ImagePool | None = None
        self._classes: dict[str, list[int]] = {}
        self._resident: Tensor | None = None  # the pool on the device

    @property
    def pool(self) -> ImagePool:
        """All images of the source, loaded on first use."""
        if self._pool is None:
            pool, splits = self.source.load()
            ids = {name: i for i, name in enumerate(pool.class_names)}
            refuse_overlap(splits)
            self._classes = {split: [ids[c] for c in names] for split, names in splits.items()}
            self._pool = pool
        return self._pool

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that learners get."""
        return self._image_shape or self.pool.image_shape

    @property
    def fingerprint(self) -> str:
        """Of the pool."""
        return self.pool.fingerprint

    def classes(self, split: Split) -> list[int]:
        """Class ids of a split."""
        _ = self.pool
        return self._classes[split]

    def class_names(self, split: Split) -> list[str]:
        """Names of the classes of a split."""
        return [self.pool.class_names[c] for c in self.classes(split)]

    def profile(self) -> dict[str, Any]:
        """Numbers of images and classes."""
        splits: tuple[Split, ...] = ("train", "val", "test")
        classes = {split: len(self.classes(split)) for split in splits}
        return {"images": len(self.pool.labels), "classes": classes}

    def sampler(
        self, split: Split, n_way: Range, k_shot: Range, n_query: int, tasks_per_shape: int = 1
    ) -> EpisodeSampler:
        """The stream of episodes of a split in a given shape.

        Raises:
            UserError: if the split cannot fill such episodes.
        """
        return EpisodeSampler(
            self.pool.labels,
            self.classes(split),
            self.pool.class_names,
            n_way,
            k_shot,
            n_query,
            self.stream_seed(split),
            split,
            tasks_per_shape,
        )

    def setup(self, stage: str) -> None:
        """Load the pool and check that the splits can fill the episodes asked for.

        Raises:
            UserError: naming every split that cannot.
        """
        _ = self.pool  # missing or damaged data speaks for itself
        channels = self.image_shape[0]
        problems = [
            f"data.{name}: found {values}; the images have {channels} channel(s)"
            for name, values in (("mean", self.mean), ("std", self.std))
            if len(values) not in (1, channels)
        ]
        for split in ("train", "val") if stage == "fit" else (stage.replace("validate", "val"),):
            try:
                self._dataset(split)
            except UserError as error:
                episodic = split == "train" and not self.images_per_batch
                problems.append(f"data.{'train_' if episodic else ''}{error}")
        if problems:
            raise UserError("\n".join(problems))

    def _dataset(self, split: Split) -> EpisodeDataset | ImageDataset:
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        resident, cuda = self.keep_on(device), device.type == "cuda"
        pin = cuda and not resident and not self.num_workers  # the loader pins what workers make
        if split == "train" and self.images_per_batch:
            images = ImageSampler(self.pool.labels, self.classes(split), self.seed, split)
            return ImageDataset(self.pool, images, resident, pin)
        shape: tuple[Range, Range, int] = (self.n_way, self.k_shot, self.n_query)
        group = 1
        if split == "train":
            shape, group = self.train_shape, self.meta_batch_size * self._world()[1]
        return EpisodeDataset(self.pool, self.sampler(split, *shape, group), resident, pin)

    def keep_on(self, device: torch.device) -> bool:
        """Move the whole pool to a GPU if it takes at most half of what is free there."""
        if self._resident is not None and self._resident.device == device:
            return True
        if (
            device.type != "cuda"
            or self.pool.images.nbytes > torch.cuda.mem_get_info(device)[0] / 2
        ):
            return False
        self._resident = torch.from_numpy(np.array(self.pool.images)).to(device)
        return True

    def images(self, indices: Tensor, device: torch.device) -> Tensor:
        """Images of the pool on a device: (...) int64 -> (..., C, H, W) uint8."""
        if self._resident is not None and self._resident.device == device:
            return self._resident[indices.to(device, non_blocking=True)]
        return torch.from_numpy(np.take(self.pool.images, indices.cpu().numpy(), axis=0)).to(device)

    def task(self, sampler: EpisodeSampler, index: int, device: torch.device) -> Episode:
        """See `EpisodeLoaders.task`."""
        task = EpisodeDataset(self.pool, sampler)[index].each(lambda field: field.to(device))
        return task._replace(
            support_x=self.prepare(task.support_x), query_x=self.prepare(task.query_x)
        )

    @property
    def _batch_size(self) -> int:
        """Episodes or images in a training step of one process."""
        return self.images_per_batch or self.meta_batch_size

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images (m, C, H, W) -> float (m, *image_shape), as every learner takes them."""
        return to_float(images, self.image_shape, self.mean, self.std)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Gather from the pool if it is there, augment (in training) and standardise."""
        augment = self.augmentation if self.trainer and self.trainer.training else None
        seeds = [self.seed * 0x9E3779B1 + i for i in batch.id.tolist()] if augment else []
        draws = [torch.Generator().manual_seed(s) for s in seeds]  # of the episode or image alone

        def ready(images: Tensor, axes: int) -> Tensor:
            """Images with so many axes in front of their own."""
            if images.dim() == axes:  # rows of the pool
                images = self.images(images, images.device)
            lead, flat = images.shape[:axes], images.flatten(0, axes - 1)
            return self.prepare(augment(flat, *draws) if augment else flat).unflatten(0, lead)

        if isinstance(batch, Images):
            return batch._replace(x=ready(batch.x, 1))
        return batch._replace(support_x=ready(batch.support_x, 2), query_x=ready(batch.query_x, 2))


def refuse_overlap(splits: Splits) -> None:
    """Meta-learning is tested on classes never seen: no class may stand in two splits.

    Raises:
        UserError: naming the first class that does.
    """
    for (first, a), (second, b) in combinations(splits.items(), 2):
        shared = sorted(set(a) & set(b))
        if shared:
            raise UserError(
                f"splits: class {shared[0]!r} is in both {first!r} and {second!r} "
                f"({len(shared)} such); splits must be disjoint in classes"
            )


def _as_range(value: Range | Sequence[int]) -> Range:
    """YAML gives a range as a list."""
    return value if isinstance(value, int) else (value[0], value[1])
