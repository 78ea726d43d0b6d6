"""EpisodeLoaders: streams of episodes, whatever they are made of -> three loaders. Floor 2."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.annotations import Measure
from pipeline.data.episodes import EpisodeBatches, Prefetched
from pipeline.episode import Batch, Episode

Split = Literal["train", "val", "test"]
Loader = DataLoader[Batch] | Prefetched


class EpisodeLoaders(pl.LightningDataModule, ABC):
    """Deals the episodes of three splits to processes, and resumes a stream where it was.

    Attributes:
        measure: what its tasks are scored by.
        eval_batch: episodes that are validated in one step.
        source: what the tasks are made of; has a name.
    """

    measure: ClassVar[Measure]
    eval_batch: ClassVar[int]
    source: Any
    n_way: int
    k_shot: int
    n_query: int
    meta_batch_size: int
    batches_per_epoch: int
    val_episodes: int
    test_episodes: int
    seed: int
    eval_seed: int
    num_workers: int

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what learners get."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of all that tasks are made of, 64 hexadecimal digits."""

    @abstractmethod
    def class_names(self, split: Split) -> list[str]:
        """Names of the classes of a split; none where tasks have no classes."""

    @abstractmethod
    def profile(self) -> dict[str, Any]:
        """How much of what there is, for people."""

    @abstractmethod
    def sampler(self, split: Split, n_way: Any, k_shot: Any, n_query: int) -> Any:
        """The stream of episodes of a split in a given shape.

        Raises:
            UserError: if the split cannot fill such episodes.
        """

    @abstractmethod
    def task(self, sampler: Any, index: int, device: torch.device) -> Episode:
        """One episode of a stream on a device, as `adapt` takes it."""

    @abstractmethod
    def _dataset(self, split: Split) -> Dataset[Any]:
        """The stream of a split in the shape that Lightning's loops see."""

    def stream_seed(self, split: Split) -> int:
        """Names the stream of a split, together with the split."""
        return self.seed if split == "train" else self.eval_seed

    def _world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    @property
    def _batch_size(self) -> int:
        """Episodes in a training step of one process."""
        return self.meta_batch_size

    def _seen(self) -> int:
        """How many all processes have drawn so far: what the optimiser steps stand for."""
        if not self.trainer:
            return 0
        batches = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return batches * self._batch_size * self.trainer.world_size

    def _loader(self, split: Split, batches: EpisodeBatches) -> Loader:
        loader: DataLoader[Batch] = DataLoader(
            self._dataset(split),
            sampler=batches,  # yields lists of indices: the data set stacks them
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.num_workers > 0 and torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )
        return loader if self.num_workers else Prefetched(loader)

    def train_dataloader(self) -> Loader:
        """Batches of the endless training stream."""
        rank, world = self._world()
        batches_per_epoch = self.batches_per_epoch
        if self.trainer and self.trainer.max_steps > 0:  # a short training is validated at its end
            most = self.trainer.max_steps * self.trainer.accumulate_grad_batches
            batches_per_epoch = min(batches_per_epoch, most)
        epoch = batches_per_epoch * self._batch_size * world
        batches = EpisodeBatches(self._batch_size, epoch, rank, world, self._seen)
        return self._loader("train", batches)

    def val_dataloader(self) -> Loader:
        """The fixed validation episodes."""
        return self._fixed("val", self.val_episodes)

    def test_dataloader(self) -> Loader:
        """The fixed test episodes."""
        return self._fixed("test", self.test_episodes)

    def _fixed(self, split: Split, episodes: int) -> Loader:
        return self._loader(split, EpisodeBatches(self.eval_batch, episodes, *self._world()))

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """All but the indices in the stream, which are read on the CPU."""
        return batch.each(lambda field: field.to(device, non_blocking=True))._replace(id=batch.id)
