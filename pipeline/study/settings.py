"""The keys of a sweep: what they may be, and what of a command line is theirs. Floor 5."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, cast

from annotated_types import Ge, MinLen
from omegaconf import DictConfig, OmegaConf
from pydantic import StringConstraints

from pipeline.annotations import better
from pipeline.errors import UserError
from pipeline.signature import plain, value_problem
from pipeline.study.space import Dimension, dimensions

Positive = Annotated[int, Ge(1)]
KEYS: dict[str, Any] = {
    "n_trials": Positive,
    "workers": Positive | Literal["auto"],
    "workers_per_gpu": Positive,
    "executor": Literal["local", "ray", "slurm"],
    "address": Annotated[str, MinLen(1)],
    "slurm": dict[str, Any],
    "storage": str | None,
    "study": Annotated[str, StringConstraints(pattern=r"^[\w.\-]+$")] | None,  # names a folder
    "sampler": Literal["tpe", "gp", "random", "grid", "qmc"],
    "pruner": Literal["hyperband", "median", "wilcoxon", "none"],
    "objectives": Any,  # see _objectives
    "heartbeat": Positive,
    "attempts": Positive,
    "retrain_best": bool,
    "retrain_seeds": Positive,
}
_ITS_OWN = {"resume": "the same command goes on with a sweep", "run_name": "a trial has a number",
            "test": "a trial is never tested; retrain_best=true tests the best"}  # fmt: skip
_NAMING = ("sampler", "pruner", "objectives")
"""Settings that make it another study; the others only say how it is carried out."""


class Settings(NamedTuple):
    """A checked sweep."""

    cfg: DictConfig
    overrides: list[str]  # those of the trainings
    space: list[Dimension]
    name: str

    @property
    def mode(self) -> Literal["max", "min"]:
        """Which of two values of the first objective is the better one."""
        return better(self.cfg.objectives[0].removeprefix("val/"))

    @property
    def steps_per_validation(self) -> int:
        """Outer steps between two reports."""
        cfg = self.cfg
        per_epoch = cfg.data.batches_per_epoch // max(1, cfg.trainer.accumulate_grad_batches)
        return max(1, min(per_epoch, cfg.trainer.max_steps))


def read(cfg: DictConfig, overrides: Sequence[str]) -> Settings:
    """Check what is the sweep's; what is a training's is checked where torch is at hand.

    Args:
        cfg: a composed `conf/sweep.yaml`.
        overrides: what it was composed with.

    Raises:
        UserError: one line for each problem.
    """
    problems = [
        f"{key}: found {plain(cfg[key])!r}; {problem}"
        for key, annotation in KEYS.items()
        if (problem := value_problem(cfg[key], annotation))
    ]
    cfg, allowed = cfg.copy(), _objectives(cfg.data)
    if cfg.objectives and cfg.objectives[0] == "val":
        cfg.objectives[0] = allowed[0][0]
    if plain(cfg.objectives) not in allowed:
        shown = " and ".join(f"[{','.join(each)}]" for each in allowed)
        problems.append(f"objectives: found {plain(cfg.objectives)}; allowed are {shown}")
    theirs = [o for o in overrides if _root(o) not in {*KEYS, "space"}]
    problems += [f"{o}: {_ITS_OWN[_root(o)]}" for o in theirs if _root(o) in _ITS_OWN]
    if cfg.trainer.get("devices", 1) != 1:
        found = plain(cfg.trainer.devices)
        problems.append(f"trainer.devices: found {found}; each trial of a sweep has one device")
    if "optimizer" not in cfg.learner:
        label = cfg.learner._target_.rpartition(".")[2]
        problems.append(f"learner: {label} has nothing to train, so nothing to search")
    space: list[Dimension] = []
    try:
        space = dimensions(cfg.space, cfg)
    except UserError as error:
        problems += str(error).splitlines()
    named = [(f"space.{each.key}", each.key) for each in space]
    named += [(f"space.{each.key}.when", key) for each in space for key in each.when]
    problems += [
        f"{where}: no key {key} in the configuration; + adds it: +{key}=VALUE"
        for where, key in named
        if not _has(cfg, key)
    ]
    if cfg.sampler == "grid" and any(each.when for each in space):
        problems.append("sampler: grid takes no dimension with `when`")
    elif cfg.sampler == "grid" and not problems:
        size = math.prod(len(each.grid()) for each in space)
        if cfg.n_trials > size:
            problems.append(f"n_trials: found {cfg.n_trials}; the grid of this space has {size}")
    if plain(cfg.objectives) == allowed[1] and cfg.retrain_best:
        problems.append("retrain_best: with several objectives there is no one best")
    if problems:
        raise UserError("\n".join(problems))
    return Settings(cfg, theirs, space, cfg.study or _name(cfg, space))


def _objectives(data: DictConfig) -> list[list[str]]:
    """What may be searched for; a task of one output has no classes but real targets."""
    score = "val/mse" if data.n_way == 1 else "val/acc"
    return [[score], [score, "adapt_seconds"]]


def _has(cfg: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return isinstance(node, DictConfig) and name in node


def _root(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0].partition(".")[0]


def fingerprint(cfg: DictConfig, space: Sequence[Dimension]) -> str:
    """What makes two sweeps the same study: 8 hex digits of its configuration and space."""
    resolved = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    kept = {k: v for k, v in resolved.items() if k not in KEYS.keys() - _NAMING}
    kept["space"] = [each.model_dump() for each in space]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def _name(cfg: DictConfig, space: Sequence[Dimension]) -> str:
    parts = [node._target_.rpartition(".")[2].lower() for node in (cfg.learner, cfg.data)]
    return "-".join([*parts, fingerprint(cfg, space)])


def shown(settings: Settings, storage: str) -> dict[str, Any]:
    """The configuration as the parent run has it: without a password.

    Args:
        storage: the URL.
    """
    from pipeline.study.storage import shown_url

    resolved = cast(dict[str, Any], OmegaConf.to_container(settings.cfg, resolve=True))
    return {**resolved, "storage": shown_url(storage)}
