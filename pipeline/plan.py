"""What a survey has to train and test, and which of it is on the shelf already. Floor 4."""

import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import hydra
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from pipeline import config, sources
from pipeline.compose import CONF, compose_config
from pipeline.errors import UserError
from pipeline.learners.embedding import EmbeddingLearner
from pipeline.signature import parameters
from pipeline.tested import FLOOR
from pipeline.tracking.read import Reader
from pipeline.tracking.run import flatten
from pipeline.tracking.store import find_checkpoint

VALIDATIONS = 5  # in a training
_ELSEWHERE = {"data.root", "data.num_workers", "trainer.accelerator"}
"""Parameters in which a finished run may differ from what is asked for."""
_FILLED_IN = {"data.image_shape", "learner.n_train_classes", "trainer.devices"}
"""Those whose null or auto a training replaces."""


class Job(NamedTuple):
    """One training and what it is tested on.

    Attributes:
        name: of its run.
        learner, data: as the table has them.
        overrides: of `python -m pipeline.train`, but for `init_from`.
        cfg: what they compose to.
        tests: (n_way, k_shot) that the training's own test covers, then those that `evaluate` adds.
        heads: names of heads to be tested too, by label.
        after: the job whose network it takes over; None if it starts afresh.
    """

    name: str
    learner: str
    data: str
    overrides: list[str]
    cfg: DictConfig
    tests: list[tuple[int, int]]
    heads: dict[str, str]
    after: "Job | None"


def plan(cfg: DictConfig) -> list[Job]:
    """The jobs of a survey.

    Raises:
        UserError: a line for everything that cannot be composed or trained so.
    """
    names = sorted(p.stem for p in (CONF / "learner").glob("*.yaml"))
    names = [name for name in names if "optimizer" in _learner(name)]
    wanted = list(cfg.learners or names)
    half = cast(dict[str, str], OmegaConf.to_container(cfg.half))
    named = {"learners": wanted, "half": [*half, *half.values()], "heads_on": [cfg.heads_on]}
    for key, learners in named.items():
        if unknown := sorted(set(learners) - set(names)):
            raise UserError(
                f"{key}: no learner {unknown[0]!r} to train; there are {', '.join(names)}"
            )
    for key in ("images", "episodes"):
        if cfg[key].keys() != cfg.data.keys():
            found, needed = ", ".join(cfg[key]), ", ".join(cfg.data)
            raise UserError(f"{key}: found {found}; needs {needed}, as data")
    for data in cfg.data:
        node = compose_config("train", [f"data={data}"]).data
        if sources.data_module(node).measure != "acc":
            raise UserError(f"data: {data} has real targets; a survey is of classes")
    heads = _heads(cfg)
    jobs, problems = [], []
    for data, given in cfg.data.items():
        for learner in wanted:
            for ways in _ways(learner, cfg):
                first = half.get(learner, "")
                try:
                    if first:
                        jobs.append(_job(cfg, first, data, given, ways[:1], {}, 0.5))
                    on_it = heads if learner == cfg.heads_on else {}
                    after = jobs[-1] if first else None
                    part = 0.5 if first else 1.0
                    jobs.append(_job(cfg, learner, data, given, ways, on_it, part, after))
                except UserError as error:
                    problems += [f"{learner} on {data}: {line}" for line in str(error).splitlines()]
    if problems:
        raise UserError("\n".join(problems))
    return list({job.name: job for job in jobs}.values())


@cache
def _learner(name: str) -> DictConfig:
    node: DictConfig = compose_config("train", [f"learner={name}"]).learner
    return node


def _heads(cfg: DictConfig) -> dict[str, str]:
    """Label and name of the heads to be tested."""
    found = {}
    there = sorted(p.stem for p in (CONF / "head").glob("*.yaml"))
    if unknown := sorted(set(cfg.heads or []) - set(there)):
        raise UserError(f"heads: no head {unknown[0]!r}; there are {', '.join(there)}")
    for name in there:
        head = config.build_head(compose_config("evaluate", [f"head={name}"]).head)
        if name in cfg.heads if cfg.heads is not None else head.transductive:
            found[head.label] = name
    target = hydra.utils.get_class(_learner(cfg.heads_on)._target_)
    if found and not issubclass(target, EmbeddingLearner):
        raise UserError(f"heads_on: found {cfg.heads_on!r}, which has no embeddings")
    return found


def _ways(learner: str, cfg: DictConfig) -> list[list[tuple[int, int]]]:
    """The tests, grouped by what one training can be tested on."""
    tests = [(n_way, k_shot) for n_way, k_shot in cfg.tests]
    if "n_way" not in parameters(hydra.utils.get_class(_learner(learner)._target_)):
        return [tests]
    return [[t for t in tests if t[0] == n] for n in dict.fromkeys(t[0] for t in tests)]


def _job(
    cfg: DictConfig, learner: str, data: str, given: Mapping[str, Any],
    tests: list[tuple[int, int]], heads: dict[str, str], part: float, after: Job | None = None,
) -> Job:  # fmt: skip
    n_way = tests[0][0]
    name = f"{learner} {data} {n_way}-way" + (" half" if part < 1 and not after else "")
    overrides = [f"learner={learner}", f"data={data}", f"data.n_way={n_way}"]
    overrides += [*as_overrides({"data": given}), *as_overrides(cfg.overrides)]
    composed = compose_config("train", overrides)
    rounds = max(1, round(part * cfg.images[data] / images_per_step(composed) / VALIDATIONS))
    settings = {
        "trainer": {"max_steps": VALIDATIONS * rounds},
        "data": {"batches_per_epoch": rounds, "test_episodes": cfg.episodes[data]},
        "test_k_shot": sorted({k for n, k in tests if n == n_way}),
        "experiment_name": cfg.experiment_name,
        "run_name": name,
    }
    overrides += as_overrides(settings)
    composed = cast(DictConfig, OmegaConf.merge(composed, settings))  # sooner than to compose again
    config.check(composed)
    return Job(name, learner, data, overrides, composed, tests, heads, after)


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """`KEY=VALUE` of a nested mapping, as a command line has it."""
    plain = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(dict(values))))
    # JSON is what Hydra reads, but for \u escapes, and an empty mapping, which says nothing
    return [
        f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in flatten(plain).items() if v != {}
    ]


def images_per_step(cfg: DictConfig) -> float:
    """Training images that one step of a composed `train` looks at; a range counts by its mean."""

    def mean(value: Any) -> float:
        return float(value) if isinstance(value, int) else sum(value) / len(value)

    data = cfg.data
    if data.images_per_batch:
        return float(data.images_per_batch)
    per_class = mean(data.train_k_shot) + data.train_n_query
    return float(data.meta_batch_size * mean(data.train_n_way) * per_class)


class Shelf:
    """The runs of a survey's experiment."""

    def __init__(self, experiment: str) -> None:
        self._reader, self._experiment = Reader(), experiment
        self._lock = threading.Lock()

    def run_of(self, job: Job) -> str | None:
        """The newest run that was, or is being, trained as the job asks."""
        run = self._find(job)
        return str(run["run_id"]) if run else None

    def _find(self, job: Job) -> dict[Any, Any] | None:
        """See `run_of`; its parameters are those asked for, no more and no fewer."""
        asked = flatten(cast(dict[str, Any], OmegaConf.to_container(job.cfg, resolve=True)))
        if job.after:
            asked["init_from"] = self.run_of(job.after)
        if path := asked.get("data.split_file"):
            asked["data.split_file"] = os.path.abspath(Path(path).expanduser())
        free = _ELSEWHERE | {k for k in _FILLED_IN if asked.get(k) in (None, "auto")}
        wanted = {f"params.{k}": str(v) for k, v in asked.items() if k not in free}
        runs = self._reader.experiment(self._experiment, new=True)
        for run in runs[runs["name"] == job.name].to_dict("records"):
            keys = [str(k) for k in run if str(k).startswith("params.")]
            has = {k: run[k] for k in keys if isinstance(run[k], str)}  # nan: others have it
            if {k: v for k, v in has.items() if k.removeprefix("params.") not in free} == wanted:
                return run
        return None

    def _table(self, job: Job) -> pd.DataFrame:
        run = self._find(job)
        table = self._reader.results(run["run_id"]) if run else pd.DataFrame()
        if run is None or table.empty:
            return pd.DataFrame(columns=["learner", "n_way", "k_shot", "episodes"])
        mine = table["data"] == run.get("tags.data")  # a user may have tested it on other data
        mine &= table["n_query"] == job.cfg.data.n_query
        return table[mine & (table["episodes"] == job.cfg.data.test_episodes)]

    def results(self, job: Job) -> pd.DataFrame:
        """The rows of results.json that are of the learner, with or without another head."""
        table = self._table(job)
        return table[table["learner"] != FLOOR]

    def floor(self, job: Job) -> pd.DataFrame:
        """Those of the pixel floor."""
        table = self._table(job)
        return table[table["learner"] == FLOOR]

    def is_done(self, job: Job) -> bool:
        """Whether a job was trained and all its tests were made."""
        return not self._untested(job)

    def next_command(self, job: Job) -> list[str]:
        """Module and arguments of the next step of a job; empty if it is done.

        Raises:
            UserError: if the run that it starts from is not done.
        """
        with self._lock:
            run, untested = self.run_of(job), self._untested(job)
            if not untested:
                return []
            if len(untested) == len(job.tests) * (1 + len(job.heads)):
                return ["pipeline.train", *self._start(job, run)]
        label, n_way, _ = untested[0]
        shots = [k for other, n, k in untested if (other, n) == (label, n_way)]
        head = [f"head={job.heads[label]}"] if label else []
        shape = [f"n_way={n_way}", f"k_shot={shots}".replace(" ", "")]
        return ["pipeline.evaluate", f"run={run}", *shape, *head, "inside=false"]

    def _untested(self, job: Job) -> list[tuple[str, int, int]]:
        """Head (empty for the learner's own), n_way and k_shot of every test that is not made."""
        table = self.results(job)
        heads = table["learner"].map(_head_of)
        made = set(zip(heads, table["n_way"], table["k_shot"], strict=True))
        wanted = [(head, n, k) for head in ("", *job.heads) for n, k in job.tests]
        return [test for test in wanted if test not in made]

    def _start(self, job: Job, run: str | None) -> list[str]:
        if run:
            with suppress(UserError):  # stopped before its first checkpoint: from the start
                find_checkpoint(run, "last")
                root = [o for o in job.overrides if o.startswith("data.root=")]
                return [f"resume={run}", *(o for o in root if o != "data.root=null")]
        if not job.after:
            return job.overrides
        if not self.is_done(job.after):  # its network may be half trained
            raise UserError(f"{job.after.name!r}, which it starts from, is not done")
        return [*job.overrides, f"init_from={self.run_of(job.after)}"]


def _head_of(learner: str) -> str:
    """`TIM` of `Baseline + TIM`."""
    return learner.partition(" + ")[2]
