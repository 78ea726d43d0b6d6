"""Scores a learner on fixed episodes, many at a time. Floor 3.

Embedding learners with an inductive backbone embed each image once; their episodes are then
gathers of embeddings and calls of `heads`, which is what `adapt` does after embedding.
"""

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.annotations import Measure
from pipeline.data.datamodule import EpisodicDataModule
from pipeline.data.episodes import EpisodeIndices, EpisodeSampler
from pipeline.data.functions import FunctionEpisodes
from pipeline.data.loaders import EpisodeLoaders, Split
from pipeline.episode import Episode
from pipeline.functional import MeanInterval, mean_ci95
from pipeline.learners.base import MetaLearner
from pipeline.learners.embedding import EMBED_BATCH, EmbeddingLearner
from pipeline.learners.gradient import GradientLearner
from pipeline.learners.regression import FunctionScorer

CHUNK = 16  # episodes predicted at a time
GATHERED = 2**23  # numbers in the embeddings gathered at a time, 32 MiB
WARM_UP = 3  # tasks adapted to before the clock runs


class Scores(NamedTuple):
    """Predictions on a list of episodes.

    Attributes:
        correct: (episodes, n_way*n_query) bool.
        classes: (episodes, n_way*n_query) true class of each query, an id of the pool.
        episode_list: SHA-256 (hex) of the pool and of the images and classes of every episode, in
            order. Accuracies of equal lists may be compared episode by episode.
    """

    correct: np.ndarray
    classes: np.ndarray
    episode_list: str

    @property
    def measure(self) -> Measure:
        """What `by_episode` is."""
        return "acc"

    def by_episode(self) -> np.ndarray:
        """(episodes,) share of correct queries."""
        return self.correct.mean(1)

    def interval(self) -> MeanInterval:
        """Mean accuracy over episodes and its 95 % half width, in 0..1."""
        return mean_ci95(torch.from_numpy(self.by_episode()))

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
        correct, classes = [], []
        shape = (*sampler.shape(0), sampler.n_query)
        identity = hashlib.sha256(f"{self.data.pool.fingerprint} {shape}".encode())
        for done, chosen, logits in self._predictions(sampler, episodes):
            correct.append((logits.argmax(2) == _query_y(chosen, logits)).cpu().numpy())
            classes.append(chosen.classes.repeat(chosen.query.shape[2], axis=1))
            identity.update(_as_bytes(chosen))
            progress(done)
        return Scores(np.concatenate(correct), np.concatenate(classes), identity.hexdigest())

    def logits(
        self,
        sampler: EpisodeSampler,
        episodes: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> tuple[Tensor, Tensor]:
        """What `score` counts the right ones of.

        Returns:
            On the CPU, of all queries: logits (episodes*n_way*n_query, n_way), true labels
            (episodes*n_way*n_query,).
        """
        parts, labels = [], []
        for done, chosen, logits in self._predictions(sampler, episodes):
            parts.append(logits.flatten(0, 1).cpu())  # (t*q, n_way)
            labels.append(_query_y(chosen, logits).repeat(len(logits)).cpu())
            progress(done)
        return torch.cat(parts), torch.cat(labels)

    @torch.inference_mode()
    def _predictions(
        self, sampler: EpisodeSampler, episodes: int
    ) -> Iterator[tuple[int, EpisodeIndices, Tensor]]:
        """So many episodes done, with the last few of them and their logits."""
        was_training = self.learner.training
        self.learner.eval()
        try:
            for done, chosen in self._chunks(sampler, episodes):
                yield done, chosen, self._predict(chosen)
        finally:
            self.learner.train(was_training)

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


def _query_y(chosen: EpisodeIndices, logits: Tensor) -> Tensor:
    """(n_way*n_query,) labels, the same in every episode."""
    n_way, n_query = chosen.query.shape[1:]
    return torch.arange(n_way, device=logits.device).repeat_interleave(n_query)


def _as_bytes(chosen: EpisodeIndices) -> bytes:
    """Episode after episode, so that the bytes of a list do not depend on how it is cut."""
    rows = [field.reshape(len(field), -1) for field in chosen]  # (tasks, numbers of an episode)
    return np.concatenate(rows, axis=1).astype("<i8").tobytes()


def make_scorer(
    learner: MetaLearner, data: EpisodeLoaders, split: Split
) -> Scorer | FunctionScorer:
    """What scores a learner on tasks of this data."""
    if isinstance(data, EpisodicDataModule):
        return Scorer(learner, data, split)
    return FunctionScorer(learner, data)


@contextmanager
def adapting_in(learner: MetaLearner, steps: int | None) -> Iterator[None]:
    """Evaluation with another number of inner steps; None leaves it."""
    if steps is None or not isinstance(learner, GradientLearner):
        yield
        return
    own = learner.eval_inner_steps
    learner.eval_inner_steps = steps
    try:
        yield
    finally:
        learner.eval_inner_steps = own


def shown_steps(learner: GradientLearner) -> list[int]:
    """Numbers of inner steps, from none to those it is tested with.

    Every step up to three, then about a third more each time: what a long inner loop does is seen
    from few evaluations.
    """
    steps = learner.eval_inner_steps
    return sorted({min(k, steps) for k in (0, 1, 2, 3, 5, 7, 10, 14, 20, 30, 50, steps)})


def score_by_steps(
    learner: GradientLearner,
    data: EpisodeLoaders,
    sampler: EpisodeSampler | FunctionEpisodes,
    episodes: int,
) -> dict[int, float]:
    """Mean test score after each of `shown_steps`."""
    scorer = make_scorer(learner, data, "test")
    out = {}
    for k in shown_steps(learner):
        with adapting_in(learner, k):
            out[k] = scorer.score(sampler, episodes).interval().mean  # type: ignore[arg-type]  # scorer and sampler are both of `data`
    return out


def adaptation_seconds(
    learner: MetaLearner,
    data: EpisodeLoaders,
    split: Split,
    n_way: int,
    k_shot: int,
    n_query: int,
    tasks: int = 11,
) -> float:
    """Median time to adapt to one task, images on the device already, in seconds.

    A transductive head adapts when it sees the queries; its time is that of all the task.

    Args:
        learner: in whatever mode; timed in eval mode on the device it is on.
        data, split, n_way, k_shot, n_query: whose first episodes are adapted to.
        tasks: how many are timed, one at a time.
    """
    device, was_training = learner.device, learner.training
    sampler = data.sampler(split, n_way, k_shot, n_query)
    head = learner.task_head if isinstance(learner, EmbeddingLearner) else None
    with_queries = head is not None and head.transductive
    learner.eval()
    seconds = []
    with torch.inference_mode():
        for index in range(WARM_UP + tasks):
            task = data.task(sampler, index, device)
            _wait(device)
            start = time.perf_counter()
            classify = learner.adapt(task.support_x, task.support_y)
            if with_queries:
                classify(task.query_x)
            _wait(device)
            seconds.append(time.perf_counter() - start)
    learner.train(was_training)
    return statistics.median(seconds[WARM_UP:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
