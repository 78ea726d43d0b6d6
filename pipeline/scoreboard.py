"""Test sets, the closing table and its terminal form. Floor 4."""

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from pipeline import config
from pipeline.compose import compose_config, one_line
from pipeline.data.datamodule import EpisodicDataModule
from pipeline.data.episodes import EpisodeSampler
from pipeline.errors import UserError
from pipeline.learners.base import MetaLearner
from pipeline.learners.evaluation import Scorer, Scores, adaptation_seconds
from pipeline.learners.pixel_centroid import PixelCentroid
from pipeline.progress import Slow


class FixedEpisodes(NamedTuple):
    """Fixed episodes on which learners are compared.

    Attributes:
        scored_by: the head under which the network is tested; empty for the learner's own.
    """

    name: str
    data: EpisodicDataModule
    n_way: int
    k_shot: int
    n_query: int
    episodes: int
    scored_by: str = ""

    def sampler(self) -> EpisodeSampler:
        """The stream of these episodes: the same for every learner and run."""
        return self.data.sampler("test", self.n_way, self.k_shot, self.n_query)

    @property
    def key(self) -> str:
        """As names of metrics and files have it: digits_5w1s, under a head digits_5w1s_TIM."""
        name = re.sub(r"[^\w.\- ]", "_", self.name)  # what MLflow takes in a name
        head = re.sub(r"[^\w.\-]+", "_", self.scored_by).strip("_")
        return f"{name}_{self.n_way}w{self.k_shot}s" + (f"_{head}" if head else "")


class Result(NamedTuple):
    """One learner on one test set.

    Attributes:
        backbone: name of its network; empty if it has none.
        parameters: how many numbers it has learned.
        adapt_seconds: to adapt to one task, alone on the device.
    """

    learner: str
    protocol: str
    test: FixedEpisodes
    scores: Scores
    backbone: str
    parameters: int
    adapt_seconds: float


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
            if unfit := given.keys() & config.EPISODIC:
                key = sorted(unfit)[0]
                problems.append(f"also_test: {key}: all test sets take that of data.{key}")
            config.check(other)
            nodes.append(other.data)
        except OmegaConfBaseException as error:
            problems.append(f"also_test: {one_line(error)}")
        except UserError as error:
            problems += [f"also_test: {line}" for line in str(error).splitlines()]
    if problems:
        raise UserError("\n".join(problems))
    return nodes


def make_test_sets(
    cfg: DictConfig, data: EpisodicDataModule, others: Sequence[DictConfig], k_shots: Sequence[int]
) -> list[FixedEpisodes]:
    """The test split of the data set and of every other one, at each number of shots.

    Args:
        others: from `other_sources`; their images are adapted in channels, size and
            standardisation to those of `data`.

    Raises:
        UserError: naming every set that cannot fill the episodes asked for.
    """
    shape = list(data.image_shape)
    nodes = [config.with_source(cfg.data, other, image_shape=shape) for other in others]
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


def score_all(
    learner: MetaLearner, sets: Iterable[FixedEpisodes], backbone: str = ""
) -> list[Result]:
    """Score the learner and the pixel floor on every set; tells how far it is."""
    learners = [learner]
    if not isinstance(learner, PixelCentroid):
        learners.append(PixelCentroid().to(learner.device))
    results = []
    scorers: dict[str, Scorer] = {}
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        for test in sets:
            scorers = {k: v for k, v in scorers.items() if v.data is test.data}  # embeddings go
            for each in learners:
                what = f"test {test.key} {each.label}"
                task = bar.add_task(what, total=test.episodes)
                line = Slow(what, test.episodes)
                scorer = scorers.setdefault(each.label, Scorer(each, test.data, "test"))

                def done(n: int, task: TaskID = task, line: Slow = line) -> None:
                    bar.update(task, completed=n)
                    line(n)

                scores = scorer.score(test.sampler(), test.episodes, done)
                shape = (test.n_way, test.k_shot, test.n_query)
                took = adaptation_seconds(each, test.data, "test", *shape)
                network = backbone if each is learner else ""
                size = sum(p.numel() for p in each.parameters())
                results.append(Result(each.label, each.protocol, test, scores, network, size, took))
    return results


def to_frame(results: Iterable[Result], published: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a result; accuracy and ci95 in percent.

    Args:
        published: values of the literature, each with data, n_way, k_shot, learner, accuracy and
            source; shown beside the row that they match.
    """
    rows = []
    for learner, protocol, test, scores, backbone, parameters, adapt_seconds in results:
        mean, ci95 = scores.interval()
        beside = [
            p
            for p in published
            if (p["learner"], p["data"], p["n_way"], p["k_shot"])
            == (learner, test.name, test.n_way, test.k_shot)
        ]
        rows.append(
            {
                "learner": learner,
                "data": test.name,
                "n_way": test.n_way,
                "k_shot": test.k_shot,
                "n_query": test.n_query,
                "accuracy": round(100 * mean, 2),
                "ci95": round(100 * ci95, 2),
                "episodes": test.episodes,
                "protocol": protocol,
                "published": beside[0]["accuracy"] if beside else math.nan,
                "published_source": beside[0]["source"] if beside else "",
                "backbone": backbone,
                "parameters": parameters,
                "adapt_ms": round(1000 * adapt_seconds, 3),
                "episode_list": scores.episode_list[:16],
            }
        )
    return pd.DataFrame(rows)


def by_episode(results: Iterable[Result]) -> dict[str, pd.DataFrame]:
    """Accuracy of every episode in 0..1, a column a learner, by `SET_NwKs_LIST`."""
    columns: dict[str, dict[str, Any]] = {}
    for result in results:
        name = f"{result.test.key}_{result.scores.episode_list[:16]}"
        columns.setdefault(name, {})[result.learner] = result.scores.accuracy()
    return {name: pd.DataFrame(each) for name, each in columns.items()}


def metrics(
    results: Iterable[Result], main: FixedEpisodes | None, learner: str
) -> dict[str, float]:
    """`test/SET_NwKs/acc`, `acc_ci95`, `floor_acc` in 0..1; of the main set as `test/acc` too."""
    out: dict[str, float] = {}
    for result in results:
        mean, ci95 = result.scores.interval()
        for prefix in [f"test/{result.test.key}/"] + ["test/"] * (result.test is main):
            if result.learner == learner:
                out |= {f"{prefix}acc": mean, f"{prefix}acc_ci95": ci95}
            else:  # MLflow draws three charts a row; the table has its interval
                out[f"{prefix}floor_acc"] = mean
    return out


def print_frame(frame: pd.DataFrame, title: str) -> None:
    """The table on standard output: for people, sets apart from each other."""
    table = Table(title=title, title_justify="left")
    shown = frame["published"].notna().any()
    for name in ("test set", "task", "learner", "accuracy", "episodes", "protocol"):
        table.add_column(name, justify="right" if name in ("accuracy", "episodes") else "left")
    if shown:
        table.add_column("published", justify="right")
    for (data, k_shot), group in frame.groupby(["data", "k_shot"], sort=False):
        for i, row in enumerate(group.itertuples()):
            cells = [
                data if i == 0 else "",
                f"{row.n_way}-way {k_shot}-shot" if i == 0 else "",
                row.learner,
                f"{row.accuracy:.2f} ± {row.ci95:.2f} %",
                str(row.episodes),
                row.protocol,
            ]
            if shown:
                cells.append("" if math.isnan(row.published) else f"{row.published:.1f} %")
            table.add_row(*cells, end_section=i == len(group) - 1)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
