"""Scores a learner on fixed episodes, many at a time. Floor 3.

Embedding learners with an inductive backbone embed each image once; their episodes are then
gathers of embeddings and calls of `heads`, which is what `adapt` does after embedding.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.datamodule import EpisodicDataModule, Split
from pipeline.data.episodes import EpisodeIndices, EpisodeSampler
from pipeline.episode import Episode
from pipeline.functional import MeanInterval, mean_ci95
from pipeline.learners.base import MetaLearner
from pipeline.learners.embedding import EMBED_BATCH, EmbeddingLearner

CHUNK = 16  # episodes predicted at a time
GATHERED = 2**23  # numbers in the embeddings gathered at a time, 32 MiB


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
            for done, chosen in self._chunks(sampler, episodes):
                n_way, n_query = chosen.query.shape[1:]
                y = torch.arange(n_way, device=self.learner.device).repeat_interleave(n_query)
                correct.append((self._predict(chosen).argmax(2) == y).cpu().numpy())
                classes.append(chosen.classes.repeat(n_query, axis=1))
                progress(done)
        self.learner.train(was_training)
        return Scores(np.concatenate(correct), np.concatenate(classes))

    def _chunks(
        self, sampler: EpisodeSampler, episodes: int
    ) -> Iterator[tuple[int, EpisodeIndices]]:
        """So many episodes done, with the last few of them."""
        size = CHUNK
        if isinstance(self.learner, EmbeddingLearner) and self.learner.embeds_once:
            images = (sampler.k_shot[1] + sampler.n_query) * sampler.n_way[1]
            size = max(1, GATHERED // (images * self._embeddings().shape[1]))
        for start in range(0, episodes, size):
            done = min(start + size, episodes)
            yield done, sampler.sample(range(start, done))

    def _predict(self, chosen: EpisodeIndices) -> Tensor:
        """(episodes, n_way*n_query, n_way) logits."""
        n_way, k_shot = chosen.support.shape[1:]
        support, query = (torch.from_numpy(x).flatten(1) for x in (chosen.support, chosen.query))
        y = torch.arange(n_way, device=self.learner.device).repeat_interleave(k_shot)
        y = y.expand(len(support), -1)  # (episodes, n_way*k_shot)
        if isinstance(self.learner, EmbeddingLearner) and self.learner.embeds_once:
            z = self._embeddings()
            return self.learner.heads(z[self._row[support]], y, z[self._row[query]], n_way)
        ids = torch.arange(len(support))
        return self.learner.predict(
            Episode(self._images(support), y, self._images(query), y, ids, n_way)
        )

    def _images(self, indices: Tensor) -> Tensor:
        raw = self.data.images(indices, self.learner.device)  # (..., C, H, W)
        lead = indices.shape
        return self.data.prepare(raw.flatten(0, len(lead) - 1)).unflatten(0, lead)

    def _embeddings(self) -> Tensor:
        """(images of the split, d), made on first use."""
        if self._embedded is None:
            assert isinstance(self.learner, EmbeddingLearner)
            self.data.keep_on(self.learner.device)
            labels = self.data.pool.labels
            used = np.flatnonzero(np.isin(labels, self.data.classes(self.split)))
            self._row = torch.full((len(labels),), -1)  # image of the pool -> row of embeddings
            self._row[used] = torch.arange(len(used))
            parts = torch.from_numpy(used).split(EMBED_BATCH)
            self._embedded = torch.cat([self.learner.embed(self._images(part)) for part in parts])
        return self._embedded
