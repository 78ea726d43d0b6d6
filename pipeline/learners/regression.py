"""Scores a learner on functions: mean squared errors. Floor 3."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from pipeline.annotations import Measure
from pipeline.data.functions import FunctionEpisodes
from pipeline.data.loaders import EpisodeLoaders
from pipeline.functional import MeanInterval, mean_ci95, score
from pipeline.learners.base import MetaLearner

CHUNK = 256  # tasks predicted at a time


class Errors(NamedTuple):
    """Predictions of real targets on a list of episodes.

    Attributes:
        mse: (episodes,) mean squared error over the queries.
        episode_list: SHA-256 (hex) of the points of every episode, in order.
    """

    mse: np.ndarray
    episode_list: str

    @property
    def measure(self) -> Measure:
        """What `by_episode` is."""
        return "mse"

    def by_episode(self) -> np.ndarray:
        """(episodes,) mean squared error."""
        return self.mse

    def interval(self) -> MeanInterval:
        """Mean error over episodes and its 95 % half width."""
        return mean_ci95(torch.from_numpy(self.mse))


class FunctionScorer:
    """A learner facing functions.

    Args:
        learner: in whatever mode; it is evaluated in eval mode on the device it is on.
        data: whose functions they are.
    """

    def __init__(self, learner: MetaLearner, data: EpisodeLoaders) -> None:
        self.learner, self.data = learner, data

    def score(
        self,
        sampler: FunctionEpisodes,
        episodes: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Errors:
        """Adapt to the first `episodes` tasks of a stream and predict their queries.

        Args:
            progress: told how many tasks are done.
        """
        device, was_training = self.learner.device, self.learner.training
        self.learner.eval()
        errors, identity = [], hashlib.sha256()
        with torch.inference_mode():
            for start in range(0, episodes, CHUNK):
                done = min(start + CHUNK, episodes)
                batch = sampler[range(start, done)]
                for task in batch.tasks():
                    for field in task[:4]:
                        identity.update(field.numpy().tobytes())
                batch = batch.each(lambda field: field.to(device))
                errors.append(score(self.learner.predict(batch), batch.query_y).cpu())
                progress(done)
        self.learner.train(was_training)
        return Errors(torch.cat(errors).double().numpy(), identity.hexdigest())
