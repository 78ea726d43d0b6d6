"""Pictures that look inside a learner that was tested on images. Floor 4.

They show the test; nothing is selected by them. What they need beyond the test's own predictions is
scored on the first episodes of the same streams.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd
import torch

from pipeline.calibration import fit_temperature, reliability
from pipeline.data.datamodule import EpisodicDataModule
from pipeline.data.episodes import EpisodeDataset, EpisodeSampler
from pipeline.errors import UserError
from pipeline.figures import inner_loop_figure, prediction_figure
from pipeline.functional import principal_components
from pipeline.inside_figures import (
    Embedded,
    Point,
    embedding_figure,
    reliability_figure,
    shape_figure,
)
from pipeline.learners.base import MetaLearner
from pipeline.learners.embedding import EmbeddingLearner
from pipeline.learners.evaluation import Scorer, Scores, shown_steps
from pipeline.learners.features import embeddings
from pipeline.learners.gradient import GradientLearner, InnerCurve
from pipeline.learners.with_head import WithHead
from pipeline.progress import scoring
from pipeline.scoreboard import FixedEpisodes, Result, Scorers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pipeline.tracking.run import Run

SHOTS, WAYS = (1, 2, 5, 10, 20), (2, 5, 10, 20)
RANKS = ("hardest", "second hardest", "third hardest")  # of the episodes that are drawn
Begin = Callable[[str, int], Callable[[int], None]]
"""See `progress.scoring`."""


class Inside:
    """A learner on one data set, looked into at every shape that it was tested in.

    Args:
        run: gets the pictures.
        learner: in eval mode.
        results: its own ones on the data set, of images.
        scorer: that made them.
        step: the training step that the weights are of.
        episodes: how many to score for a point or a diagram; the test's own number if that is less,
            and a fifth of them for a learner that computes anew for each.
    """

    def __init__(
        self,
        run: "Run",
        learner: MetaLearner,
        results: Sequence[Result],
        scorer: Scorer,
        step: int,
        episodes: int,
    ) -> None:
        self.run, self.learner, self.results, self.scorer = run, learner, results, scorer
        self.data, self.step = scorer.data, step
        once = isinstance(learner, EmbeddingLearner) and learner.embeds_once
        if not once or isinstance(learner, WithHead):
            episodes = max(1, episodes // 5)
        self.episodes = min(episodes, results[0].test.episodes)

    def log(self, begin: Begin) -> None:
        """All pictures, the quickest ones first."""
        for result in self.results:
            self._hardest(result)
            self._map(result)
        for result in self.results:
            self._inner_steps(result, begin)
        self._shapes(begin)
        if not self.data.classes("val"):
            print(f"{self.results[0].test.name}: no validation classes, so no reliability diagram")
            return
        validation = Scorer(self.learner, self.data, "val")
        for result in self.results:
            self._reliability(result, validation, begin)

    def _hardest(self, result: Result) -> None:
        """The test episodes with the lowest accuracy."""
        accuracies = result.scores.by_episode()
        hardest = np.argsort(accuracies, kind="stable")
        for place, (index, rank) in enumerate(zip(hardest, RANKS, strict=False), 1):
            what = f"the {rank} of {len(accuracies):,}"
            picture = episode_picture(self.learner, result.test, int(index), result.title, what)
            self.run.log_figure(picture, f"figures/hardest_{result.test.key}_{place}.png")

    def _map(self, result: Result) -> None:
        """Embeddings of the first test episode."""
        sampler = _sampler(result.test)
        with torch.inference_mode():
            task = self.data.task(sampler, 0, self.learner.device)
            parts = [embeddings(self.learner, x) for x in (task.support_x, task.query_x)]
            if parts[0] is None or parts[1] is None:
                return
            z = torch.cat([parts[0], parts[1]])
            if not z.isfinite().all():  # of a training that ran away
                return
            predicted = self.learner.adapt(task.support_x, task.support_y)(task.query_x).argmax(1)
            points, shares = principal_components(z, 2)
        labels = torch.cat([task.support_y, task.query_y])
        arrays = (x.cpu().numpy() for x in (points, shares, labels, predicted))
        shown = Embedded(_class_names(self.data, sampler, 0), *arrays)
        picture = embedding_figure(shown, f"{result.title}\nembeddings of test episode 0")
        self.run.log_figure(picture, f"figures/embeddings_{result.test.key}.png")

    def _inner_steps(self, result: Result, begin: Begin) -> None:
        """Support loss and query accuracy along the inner loop."""
        if not isinstance(self.learner, GradientLearner):
            return
        test, steps = result.test, shown_steps(self.learner)
        episodes = max(1, self.episodes // 2)  # each is adapted to many times
        done, curves = begin(f"inner steps {test.key}", episodes), []
        for index in range(episodes):
            task = self.data.task(_sampler(test), index, self.learner.device)
            curves.append(self.learner.inner_curve(task.each(lambda x: x.unsqueeze(0)), steps))
            done(index + 1)
        loss, accuracy = np.mean(curves, axis=0)  # (steps,) each
        table = {"inner_steps": steps, "support_loss": loss, "query_accuracy": accuracy}
        self.run.log_csv(pd.DataFrame(table), f"inside/inner_steps_{test.key}.csv")
        curve = InnerCurve(loss.tolist(), accuracy.tolist())
        title = f"{result.title}\nmean of {episodes} test episodes"
        picture = inner_loop_figure({result.learner: curve}, steps, title)
        self.run.log_figure(picture, f"figures/inner_steps_{test.key}.png")

    def _shapes(self, begin: Begin) -> None:
        """Accuracy against shots, and against ways if the learner takes any number of them."""
        first = self.results[0]
        n_way, k_shots = first.test.n_way, sorted({r.test.k_shot for r in self.results})
        shapes = {(n_way, k) for k in (*SHOTS, *k_shots)}
        if self.learner.n_way is None:
            shapes |= {(n, k) for n in WAYS for k in k_shots}
        samplers = {}
        for shape in sorted(shapes):
            try:
                samplers[shape] = self.data.sampler("test", *shape, first.test.n_query)
            except UserError:
                continue  # more than the data has
        points = []
        for (n, k), sampler in samplers.items():
            done = begin(f"{first.test.name} {n}-way {k}-shot", self.episodes)
            mean, ci95 = self.scorer.score(sampler, self.episodes, done).interval()
            points.append(Point(n, k, mean, ci95))
        if len(points) < 2:
            return
        name = first.test.family
        self.run.log_csv(pd.DataFrame(points), f"inside/shots_ways_{name}.csv")
        title = f"{first.learner} on {first.test.name}, {first.protocol}"
        title += f"\n{self.episodes} episodes a point, 95 % bands"
        picture = shape_figure(points, n_way, k_shots, title)
        self.run.log_figure(picture, f"figures/shots_ways_{name}.png")

    def _reliability(self, result: Result, validation: Scorer, begin: Begin) -> None:
        """Confidence against accuracy on test episodes; the temperature is of validation ones."""
        test = result.test
        try:
            sampler = self.data.sampler("val", test.n_way, test.k_shot, test.n_query)
            done = begin(f"confidence {test.key}, validation", self.episodes)
            temperature = fit_temperature(*validation.logits(sampler, self.episodes, done))
        except (UserError, ValueError) as error:  # too few classes; logits that are not finite
            print(f"{test.key}: no reliability diagram: {error}")
            return
        done = begin(f"confidence {test.key}", self.episodes)
        logits, y = self.scorer.logits(_sampler(test), self.episodes, done)
        before, after = (
            reliability(torch.softmax(logits.double() / t, dim=1), y) for t in (1, temperature)
        )
        numbers = {"ece": before.ece(), "ece_scaled": after.ece(), "temperature": temperature}
        self.run.log_metrics({f"test/{test.key}/{k}": v for k, v in numbers.items()}, self.step)
        title = f"{result.title}\n{len(y):,} queries; temperature from validation episodes"
        picture = reliability_figure(before, after, temperature, title)
        self.run.log_figure(picture, f"figures/reliability_{test.key}.png")


def look_inside(
    run: "Run",
    learner: MetaLearner,
    results: Sequence[Result],
    scorers: Scorers,
    step: int,
    episodes: int,
) -> None:
    """Leave pictures of every data set of images with the run; see `Inside`.

    Args:
        results: of the learner itself.
    """
    by_data: dict[str, list[Result]] = {}
    for result in results:
        if isinstance(result.scores, Scores):
            by_data.setdefault(result.test.name, []).append(result)
    with scoring() as begin:
        for name, own in by_data.items():
            scorer = cast(Scorer, scorers[name, learner.label])
            Inside(run, learner, own, scorer, step, episodes).log(begin)


def episode_picture(
    learner: MetaLearner, test: FixedEpisodes, index: int, title: str, what: str = ""
) -> "Figure":
    """One test episode of images with the predictions of the learner.

    Args:
        what: the episode is, if anything beyond its number.
    """
    data, sampler = cast(EpisodicDataModule, test.data), _sampler(test)
    episode = EpisodeDataset(data.pool, sampler)[index]
    with torch.inference_mode():
        task = data.task(sampler, index, learner.device)
        logits = learner.adapt(task.support_x, task.support_y)(task.query_x)
    predicted = logits.argmax(1).cpu()
    right = 100 * float((predicted == episode.query_y).float().mean())
    names = _class_names(data, sampler, index)
    caption = f"{title}\nepisode {index}{', ' * bool(what)}{what}: {right:.0f} % right"
    return prediction_figure(episode, predicted, names, caption)


def _sampler(test: FixedEpisodes) -> EpisodeSampler:
    return cast(EpisodeSampler, test.sampler())


def _class_names(data: EpisodicDataModule, sampler: EpisodeSampler, index: int) -> list[str]:
    """Of one episode, in the order of its labels."""
    return [data.pool.class_names[c] for c in sampler.sample([index]).classes[0]]
