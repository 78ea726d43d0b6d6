"""Scores a learner on fixed episodes. Floor 3.

Embedding learners with an inductive backbone embed each image once; their episodes are then
gathers of embeddings and calls of `head`, which is what `adapt` does after embedding.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.datamodule import EpisodicDataModule, Split
from pipeline.data.episodes import EpisodeIndices, EpisodeSampler
from pipeline.functional import MeanInterval, mean_ci95
from pipeline.learners.base import MetaLearner
from pipeline.learners.embedding import EmbeddingLearner

EMBED_BATCH = 256
CHUNK = 100  # episodes drawn at a time


class Scores(NamedTuple):
    """Predictions on a list of episodes.

    Attributes:
        correct: (episodes, n_way*n_query) bool.
        classes: (episodes, n_way*n_query) true class of each query, an id of the pool.
    """

    correct: np.ndarray
    classes: np.ndarray

    def accuracy(self) -> np.ndarray:
        """(episodes,) share of correct queries."""
        return self.correct.mean(1)

    def interval(self) -> MeanInterval:
        """Mean accuracy over episodes and its 95 % half width, in 0..1."""
        return mean_ci95(torch.from_numpy(self.accuracy()))

    def by_class(self) -> dict[int, float]:
        """Accuracy of the queries of each class."""
        return {
            int(c): float(self.correct[self.classes == c].mean()) for c in np.unique(self.classes)
        }


class Scorer:
    """A learner facing the classes of one split; images are embedded once, on first use.

    Args:
        learner: in whatever mode; it is evaluated in eval mode on the device it is on.
        data: whose pool and preparation the samplers' indices refer to.
        split: whose images may be asked for.
    """

    def __init__(self, learner: MetaLearner, data: EpisodicDataModule, split: Split) -> None:
        self.learner, self.data, self.split = learner, data, split
        self._embedded: Tensor | None = None  # (images of the split, d)

    def score(
        self,
        sampler: EpisodeSampler,
        episodes: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Scores:
        """Adapt to the first `episodes` episodes of a stream and classify their queries.

        Args:
            progress: told how many episodes are done.
        """
        was_training = self.learner.training
        self.learner.eval()
        correct, classes = [], []
        with torch.inference_mode():
            for index, chosen in _episodes(sampler, episodes):
                n_way, k_shot = chosen.support.shape
                n_query = chosen.query.shape[1]
                label = torch.arange(n_way, device=self.learner.device)
                classify = self._adapt(chosen.support, label.repeat_interleave(k_shot))
                right = classify(chosen.query).argmax(1) == label.repeat_interleave(n_query)
                correct.append(right.cpu().numpy())
                classes.append(chosen.classes.repeat(n_query))
                progress(index + 1)
        self.learner.train(was_training)
        return Scores(np.stack(correct), np.stack(classes))

    def _adapt(self, support: np.ndarray, support_y: Tensor) -> Callable[[np.ndarray], Tensor]:
        """A classifier of image indices."""
        if isinstance(self.learner, EmbeddingLearner) and self.learner.embeds_once:
            classify = self.learner.head(self._embed(support), support_y)
            return lambda query: classify(self._embed(query))
        adapted = self.learner.adapt(self._images(support), support_y)
        return lambda query: adapted(self._images(query))

    def _images(self, indices: np.ndarray) -> Tensor:
        raw = torch.from_numpy(np.asarray(self.data.pool.images[indices.reshape(-1)]))
        return self.data.prepare(raw.to(self.learner.device))  # (m, C, H, W)

    def _embed(self, indices: np.ndarray) -> Tensor:
        if self._embedded is None:
            assert isinstance(self.learner, EmbeddingLearner)
            labels = self.data.pool.labels
            used = np.flatnonzero(np.isin(labels, self.data.classes(self.split)))
            self._row = np.full(len(labels), -1)
            self._row[used] = np.arange(len(used))
            parts = np.array_split(used, -(-len(used) // EMBED_BATCH))
            self._embedded = torch.cat([self.learner.embed(self._images(part)) for part in parts])
        return self._embedded[torch.from_numpy(self._row[indices.reshape(-1)])]


def _episodes(sampler: EpisodeSampler, count: int) -> Iterator[tuple[int, EpisodeIndices]]:
    for start in range(0, count, CHUNK):
        chosen = sampler.sample(range(start, min(start + CHUNK, count)))
        for i, fields in enumerate(zip(*chosen, strict=True)):
            yield start + i, EpisodeIndices(*fields)
