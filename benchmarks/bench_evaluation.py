"""How long do 10,000 test episodes take, and how close is that to embedding the images once?

5-way 1-shot, 15 queries a class, of 20 classes of 600 images, 32x32 colour, ProtoNet with Conv4-64.
`Scorer` embeds each image once.
"""

import time
from statistics import median

import numpy as np
import torch

from benchmarks import images
from benchmarks.harness import interleave, ratio, section, table
from benchmarks.ours import parts
from pipeline.data.datamodule import EpisodicDataModule
from pipeline.learners.base import MetaLearner
from pipeline.learners.evaluation import Scorer

TITLE = "Evaluation on 10,000 episodes"
TARGET = (
    "at most 2 times the time of embedding the 12,000 test images alone; 40 times as fast as "
    "embedding each episode."
)
EPISODES = 10_000
SAMPLE = 100  # episodes that are embedded again and again; the time is scaled
REPEATS = 3
BATCH = 256
ALONE, OURS, AGAIN = "embedding the images alone", "ours (`Scorer`)", "embedding each episode"
HEADER = ["", "seconds", "over embedding alone", "over ours"]


class Contenders:
    """The three ways, on the same learner and images."""

    def __init__(self) -> None:
        _, source = images.source()
        self.learner: MetaLearner
        self.data: EpisodicDataModule
        self.learner, self.data = parts("protonet", source, "data.k_shot=1", "data.n_query=15")
        self.learner.eval()
        self.sampler = self.data.sampler("test", 5, 1, 15)

    def score(self) -> float:
        """Seconds of all episodes by a new scorer, which has embedded nothing."""
        start = time.perf_counter()
        Scorer(self.learner, self.data, "test").score(self.sampler, EPISODES)
        return time.perf_counter() - start

    def embed(self) -> float:
        """Seconds of embedding every test image once."""
        start = time.perf_counter()
        test = np.flatnonzero(np.isin(self.data.pool.labels, self.data.classes("test")))
        with torch.inference_mode():
            for part in np.array_split(test, -(-len(test) // BATCH)):
                self.learner.embed(self._images(part))
        return time.perf_counter() - start

    def embed_again(self) -> float:
        """Seconds of all episodes, each by `adapt` on its own images; scaled from some of them."""
        label = torch.arange(5)
        start = time.perf_counter()
        chosen = self.sampler.sample(range(SAMPLE))
        with torch.inference_mode():
            for support, query in zip(chosen.support, chosen.query, strict=True):
                classify = self.learner.adapt(self._images(support.reshape(-1)), label)
                classify(self._images(query.reshape(-1))).argmax(1)
        return (time.perf_counter() - start) * EPISODES / SAMPLE

    def _images(self, indices: np.ndarray) -> torch.Tensor:
        return self.data.prepare(torch.from_numpy(np.asarray(self.data.pool.images[indices])))


def main() -> str:
    """The section of the report."""
    ways = Contenders()
    contenders = {ALONE: ways.embed, OURS: ways.score, AGAIN: ways.embed_again}
    ways.embed()  # warm
    times = interleave(contenders, REPEATS)
    rows = [
        [
            name,
            f"{median(times[name]):.1f}",
            f"{ratio(times, name, ALONE):.2f}",
            f"{ratio(times, name, OURS):.1f}",
        ]
        for name in contenders
    ]
    notes = (
        f"{images.source()[0]}; an untrained network. Embedding each episode: the time of {SAMPLE} "
        f"episodes times {EPISODES // SAMPLE}. Medians of {REPEATS} interleaved repetitions."
    )
    return section(TITLE, TARGET, table(HEADER, rows), notes)


if __name__ == "__main__":
    print(main())
