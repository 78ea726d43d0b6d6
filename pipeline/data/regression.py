"""RegressionDataModule: a family of functions -> three loaders of tasks. Floor 2."""

from typing import Any, ClassVar, Literal

import torch

from pipeline.annotations import Measure, NonNegativeInt, PositiveInt
from pipeline.data.functions import FunctionEpisodes, FunctionFamily
from pipeline.data.loaders import EpisodeLoaders, Split
from pipeline.episode import Episode


class RegressionDataModule(EpisodeLoaders):
    """Episodes of functions with real values, made when they are asked for.

    There are no classes: a split is a stream of its own, and no function is drawn twice.

    Args:
        source: the functions.
        n_way, train_n_way: outputs of a network; the values are single numbers.
        k_shot, n_query: points of a function in validation; the test takes its own numbers of
            shots.
        train_k_shot, train_n_query: in training.
        The rest: see `EpisodicDataModule`.
    """

    measure: ClassVar[Measure] = "mse"
    eval_batch = 256  # a task is a few hundred numbers
    source: FunctionFamily

    def __init__(
        self,
        source: FunctionFamily,
        *,
        n_way: Literal[1],
        k_shot: PositiveInt,
        n_query: PositiveInt,
        train_n_way: Literal[1],
        train_k_shot: PositiveInt,
        train_n_query: PositiveInt,
        meta_batch_size: PositiveInt,
        batches_per_epoch: PositiveInt,
        val_episodes: PositiveInt,
        test_episodes: PositiveInt,
        seed: NonNegativeInt,
        eval_seed: NonNegativeInt,
        num_workers: NonNegativeInt,
    ) -> None:
        super().__init__()
        self.source = source
        self.n_way, self.k_shot, self.n_query = n_way, k_shot, n_query
        self.train_shape = (train_k_shot, train_n_query)
        self.meta_batch_size, self.batches_per_epoch = meta_batch_size, batches_per_epoch
        self.val_episodes, self.test_episodes = val_episodes, test_episodes
        self.seed, self.eval_seed, self.num_workers = seed, eval_seed, num_workers

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """An argument is an image of one pixel."""
        return (1, 1, 1)

    @property
    def fingerprint(self) -> str:
        """Of the functions."""
        return self.source.fingerprint

    def class_names(self, split: Split) -> list[str]:
        """None: functions have no classes."""
        return []

    def profile(self) -> dict[str, Any]:
        """What the functions are drawn from."""
        return {key: str(value) for key, value in vars(self.source).items()}

    def sampler(self, split: Split, n_way: int, k_shot: int, n_query: int) -> FunctionEpisodes:
        """See `EpisodeLoaders.sampler`; any numbers of points can be drawn."""
        return FunctionEpisodes(self.source, k_shot, n_query, self.stream_seed(split), split)

    def task(self, sampler: FunctionEpisodes, index: int, device: torch.device) -> Episode:
        """See `EpisodeLoaders.task`."""
        return sampler[index].each(lambda field: field.to(device))

    def _dataset(self, split: Split) -> FunctionEpisodes:
        shape = self.train_shape if split == "train" else (self.k_shot, self.n_query)
        return self.sampler(split, self.n_way, *shape)
