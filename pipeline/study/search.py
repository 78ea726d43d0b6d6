"""How it is searched: the study with its sampler and its pruner. Floor 5."""

import os
import socket
import zlib

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, WilcoxonPruner
from optuna.storages import RDBStorage
from optuna.study import Study, StudyDirection

from pipeline.errors import UserError
from pipeline.study.settings import Settings


def make_study(settings: Settings, storage: RDBStorage, fingerprint: str) -> Study:
    """The study of these settings, made or found.

    Raises:
        UserError: if one of this name has other settings.
    """
    cfg = settings.cfg
    found = settings.name in optuna.get_all_study_names(storage)
    directions = [
        StudyDirection.MAXIMIZE if o == "val/acc" else StudyDirection.MINIMIZE
        for o in cfg.objectives
    ]
    study = optuna.create_study(
        study_name=settings.name, storage=storage, load_if_exists=True, directions=directions,
        pruner=make_pruner(cfg.pruner, settings.steps_per_validation, cfg.trainer.max_steps),
    )  # fmt: skip
    stored = study.user_attrs.get("fingerprint")
    begun = found and bool(study.get_trials(deepcopy=False))
    if begun and stored != fingerprint:
        raise UserError(
            f"study: {settings.name!r} was made with other settings ({stored}, now {fingerprint}); "
            "give another name, or none for one that is made of the settings"
        )
    if not begun:
        study.set_user_attr("fingerprint", fingerprint)
        study.set_user_attr("overrides", settings.overrides)
    study.sampler = make_sampler(settings, len(study.get_trials(deepcopy=False)))
    return study


def make_sampler(settings: Settings, drawn: int) -> optuna.samplers.BaseSampler:
    """The sampler of a sweep.

    Args:
        drawn: trials that there are: one that goes on must not draw the first values again.
    """
    cfg, samplers = settings.cfg, optuna.samplers
    where = f"{socket.gethostname()} {os.getpid()}" if cfg.storage else ""  # one of several drivers
    seed = zlib.crc32(f"{cfg.seed} {drawn} {where}".encode())
    match cfg.sampler:
        case "tpe":
            return samplers.TPESampler(seed=seed)
        case "gp":
            return samplers.GPSampler(seed=seed)
        case "qmc":  # these two keep their place in the study
            return samplers.QMCSampler(seed=int(cfg.seed), scramble=True)
        case "grid":
            grid = {each.key: each.grid() for each in settings.space}
            return samplers.GridSampler(grid, seed=int(cfg.seed))
        case _:
            return samplers.RandomSampler(seed=seed)


def make_pruner(name: str, first: int, last: int) -> BasePruner:
    """The pruner of a sweep.

    Args:
        first: outer steps to the first report, Hyperband's least resource.
        last: outer steps of a whole training.
    """
    if name == "hyperband":
        return HyperbandPruner(min_resource=first, max_resource=max(last, first + 1))
    if name == "median":
        return MedianPruner(n_startup_trials=4, interval_steps=first)
    if name == "wilcoxon":
        return WilcoxonPruner(p_threshold=0.1, n_startup_steps=5)
    return NopPruner()
