"""Test sets, and learners scored on them. Floor 4."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline import config
from pipeline.annotations import Measure
from pipeline.compose import compose_config, one_line
from pipeline.data.episodes import EpisodeSampler
from pipeline.data.functions import FunctionEpisodes
from pipeline.data.loaders import EpisodeLoaders
from pipeline.errors import UserError
from pipeline.learners.base import MetaLearner
from pipeline.learners.evaluation import (
    Scorer,
    Scores,
    adaptation_seconds,
    adapting_in,
    make_scorer,
)
from pipeline.learners.gradient import GradientLearner
from pipeline.learners.nearest_point import NearestPoint
from pipeline.learners.pixel_centroid import PixelCentroid
from pipeline.learners.regression import Errors, FunctionScorer
from pipeline.progress import scoring
from pipeline.sources import episodic_keys, with_source

INNER_STEPS = (1, 5, 10)
"""After which errors of regression are shown, and after as many as are evaluated with."""


class FixedEpisodes(NamedTuple):
    """Fixed episodes on which learners are compared.

    Attributes:
        scored_by: the head under which the network is tested; empty for the learner's own.
    """

    name: str
    data: EpisodeLoaders
    n_way: int
    k_shot: int
    n_query: int
    episodes: int
    scored_by: str = ""

    def sampler(self) -> EpisodeSampler | FunctionEpisodes:
        """The stream of these episodes: the same for every learner and run."""
        return self.data.sampler("test", self.n_way, self.k_shot, self.n_query)

    @property
    def key(self) -> str:
        """As names of metrics and files have it: digits_5w1s, of regression sinusoid_5s.

        Under a head digits_5w1s_TIM.
        """
        ways = f"{self.n_way}w" if self.data.measure == "acc" else ""
        return self._named(f"{ways}{self.k_shot}s")

    @property
    def family(self) -> str:
        """The same at any number of shots: digits_5w, digits_5w_TIM."""
        return self._named(f"{self.n_way}w")

    def _named(self, *shape: str) -> str:
        name = re.sub(r"[^\w.\- ]", "_", self.name)  # what MLflow takes in a name
        head = re.sub(r"[^\w.\-]+", "_", self.scored_by).strip("_")
        return "_".join([name, *shape, *[head] * bool(head)])

    @property
    def task(self) -> str:
        """As tables have it."""
        return task_name(self.data.measure, self.n_way, self.k_shot)


def task_name(measure: Measure, n_way: int, k_shot: int) -> str:
    """5-way 1-shot; of regression, which has no classes, 5-shot."""
    return f"{n_way}-way {k_shot}-shot" if measure == "acc" else f"{k_shot}-shot"


class Result(NamedTuple):
    """One learner on one test set.

    Attributes:
        backbone: name of its network; empty if it has none.
        parameters: how many numbers it has learned.
        adapt_seconds: to adapt to one task, alone on the device.
        steps: inner steps that it took, where several numbers are shown.
    """

    learner: str
    protocol: str
    test: FixedEpisodes
    scores: Scores | Errors
    backbone: str
    parameters: int
    adapt_seconds: float
    steps: int | None = None

    @property
    def label(self) -> str:
        """Learner and steps."""
        return with_steps(self.learner, self.steps)

    @property
    def title(self) -> str:
        """What a picture is of: ProtoNet on digits, 5-way 1-shot, inductive."""
        return f"{self.learner} on {self.test.name}, {self.test.task}, {self.protocol}"


def with_steps(learner: str, steps: int | None) -> str:
    """The name of a learner, with a number of inner steps if there is one."""
    return learner if steps is None else f"{learner}, {steps} step{'s' * (steps != 1)}"


def is_own(result: Result, learner: MetaLearner) -> bool:
    """Whether it is of this learner as it adapts by itself, not in another number of steps."""
    own = getattr(learner, "eval_inner_steps", None)
    return result.learner == learner.label and result.steps in (None, own)


def other_sources(also_test: Sequence[str | Mapping[str, Any]]) -> list[DictConfig]:
    """The `data` node of every further test set, checked before anything is loaded.

    Args:
        also_test: names in conf/data, or {"data": NAME, KEY: VALUE, ...} to set its keys too.

    Raises:
        UserError: for names and keys that do not exist.
    """
    nodes, problems = [], []
    for spec in also_test:
        given = {"data": spec} if isinstance(spec, str) else dict(spec)
        try:
            other = compose_config("train", [f"data={given.pop('data', None)}"])
            for key, value in given.items():
                OmegaConf.update(other.data, key, value)
            if unfit := given.keys() & episodic_keys(other.data).keys():
                key = sorted(unfit)[0]
                problems.append(f"also_test: {key}: all test sets take that of data.{key}")
            config.check_data(other)
            nodes.append(other.data)
        except OmegaConfBaseException as error:
            problems.append(f"also_test: {one_line(error)}")
        except UserError as error:
            problems += [f"also_test: {line}" for line in str(error).splitlines()]
    if problems:
        raise UserError("\n".join(problems))
    return nodes


def make_test_sets(
    cfg: DictConfig, data: EpisodeLoaders, others: Sequence[DictConfig], k_shots: Sequence[int]
) -> list[FixedEpisodes]:
    """The test split of the data set and of every other one, at each number of shots.

    Args:
        others: from `other_sources`; their images are adapted in channels, size and
            standardisation to those of `data`.

    Raises:
        UserError: naming every set that cannot fill the episodes asked for.
    """
    try:
        nodes = [with_source(cfg.data, other, data.image_shape) for other in others]
    except UserError as error:
        raise UserError(f"also_test: {error}") from error
    sources = [data, *map(config.build_data, nodes)]
    sets: list[FixedEpisodes] = []
    problems = []
    for source in sources:
        for k_shot in k_shots:
            test = FixedEpisodes(
                source.source.name, source, data.n_way, k_shot, data.n_query, data.test_episodes
            )
            try:
                test.sampler()
            except UserError as error:
                problems.append(f"test set {test.name}: {error}")
            if any(test.key == other.key for other in sets):
                problems.append(f"also_test: there are two test sets named {test.key!r}")
            sets.append(test)
    if problems:
        raise UserError("\n".join(problems))
    return sets


def floor_of(data: EpisodeLoaders) -> type[PixelCentroid] | type[NearestPoint]:
    """The untrained learner that such tasks are compared with."""
    return PixelCentroid if data.measure == "acc" else NearestPoint


Scorers = dict[tuple[str, str], Scorer | FunctionScorer]
"""By test set and learner; they hold embeddings of its images."""


def score_all(
    learner: MetaLearner,
    sets: Iterable[FixedEpisodes],
    backbone: str = "",
    kept: Scorers | None = None,
) -> list[Result]:
    """Score the learner and the floor on every set; tells how far it is.

    Args:
        kept: is given the scorers, for a caller that goes on with them.
    """
    results = []
    scorers: Scorers = {} if kept is None else kept
    with scoring() as begin:
        for test in sets:
            if kept is None:
                scorers = {k: v for k, v in scorers.items() if v.data is test.data}  # these go
            floor = floor_of(test.data)
            learners = [learner] if isinstance(learner, floor) else [learner, floor()]
            for each, steps in [(one, k) for one in learners for k in _steps(one, test)]:
                each.to(learner.device)
                done = begin(f"test {test.key} {each.label}", test.episodes)
                scorer = scorers.setdefault(
                    (test.name, each.label), make_scorer(each, test.data, "test")
                )
                shape = (test.n_way, test.k_shot, test.n_query)
                with adapting_in(each, steps):
                    scores: Scores | Errors = scorer.score(test.sampler(), test.episodes, done)  # type: ignore[arg-type]  # its own kind
                    took = adaptation_seconds(each, test.data, "test", *shape)
                network = backbone if each is learner else ""
                size = sum(p.numel() for p in each.parameters())
                results.append(
                    Result(each.label, each.protocol, test, scores, network, size, took, steps)
                )
    return results


def _steps(learner: MetaLearner, test: FixedEpisodes) -> list[int | None]:
    """Numbers of inner steps to show; None for what the learner does by itself."""
    if test.data.measure == "acc" or not isinstance(learner, GradientLearner):
        return [None]
    own = learner.eval_inner_steps
    return [*(k for k in INNER_STEPS if k < own), own]
