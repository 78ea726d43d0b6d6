"""The command line of every command: compose, report bad input in one line, run. Floor 5.

Nothing heavy is imported before `run`.
"""

import os
import sys
from collections.abc import Callable, Sequence

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.compose import CONF, WITHOUT_GROUPS, OverrideError, compose_config, one_line
from pipeline.errors import UserError
from pipeline.processes import is_local_zero, repeats_errors

COMMANDS = {
    "train": "meta-train a learner, keep the best checkpoint, test it once",
    "sweep": "search for the values that validate best, with workers side by side",
    "evaluate": "score a trained run on the fixed test episodes, or on other data",
    "adapt": "make a classifier out of a few photos a class, and classify others",
    "register": "put a meta-learner into MLflow's registry, to adapt when it is asked",
    "report": "compare tested runs: leaderboard, paired differences, plots, one HTML page",
    "survey": "train and test every learner with one budget: the table of docs/learners.md",
    "demo": "a page in the browser to try a learner on your own photos",
    "ui": "open the MLflow UI on the tracked runs",
}


def help_text(name: str) -> str:
    """The header of the command's configuration, its groups and their options."""
    header: list[str] = []
    keys: list[str] = []
    for line in (CONF / f"{name}.yaml").read_text().splitlines():
        (header if line.startswith("#") and not keys else keys).append(line)
    lines = [line.removeprefix("#").removeprefix(" ") for line in header]
    lines += ["", f"Keys and defaults (conf/{name}.yaml):", ""]
    lines += [f"  {line}" for line in keys if line.strip()]
    if name in ("train", "sweep"):
        shared = (CONF / "data/base/images.yaml").read_text().splitlines()[1:]
        lines += ["", "Keys of data that is made of images (conf/data/base/images.yaml):", ""]
        lines += [f"  {line}" for line in shared]
    if name not in WITHOUT_GROUPS:
        lines += ["", "Groups (GROUP=OPTION; a file in conf/GROUP each):", ""]
        for group in sorted(p for p in CONF.iterdir() if p.is_dir()):
            options = sorted(p.stem for p in group.glob("*.yaml"))
            if options:
                lines.append(f"  {group.name}: {' '.join(options)}")
    lines += ["", "--cfg prints the composed configuration and stops."]
    return "\n".join(lines)


def _composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose; if an override does not fit, report what is wrong with the values of others too.

    A run that is resumed has its own configuration, to which it applies the overrides itself.
    """
    if name == "train" and (resume := [o for o in overrides if o.startswith("resume=")]):
        alone = compose_config(name, resume)
        if alone.resume is not None:
            if not isinstance(alone.resume, str) or not alone.resume:
                raise UserError(f"resume: found {alone.resume!r}; give the id of a stopped run")
            return alone
    try:
        return compose_config(name, overrides)
    except OverrideError as error:
        fitting = compose_config(name, error.fitting)
        try:
            _check(name, fitting, error.fitting)
        except UserError as more:
            raise UserError(f"{error}\n{more}") from error
        raise


def _check(name: str, cfg: DictConfig, overrides: Sequence[str]) -> None:
    if name == "sweep":
        from pipeline.study import settings

        settings.read(cfg, overrides)
        return
    from pipeline import config

    config.check(cfg) if name == "train" else config.check_root(cfg, name)


def _stored(run_id: str, overrides: Sequence[str]) -> DictConfig:
    from pipeline.checkpoints import restore_config
    from pipeline.tracking.store import find_checkpoint

    return restore_config(find_checkpoint(run_id, "last"), overrides)


def main(name: str, run: Callable[[DictConfig, Sequence[str]], object]) -> None:
    """Entry point of `python -m pipeline.NAME`: exit 0, 2 for bad input, 130 when interrupted.

    Args:
        name: of the command and of its configuration.
        run: gets the composed configuration and the overrides it was composed with.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(help_text(name))
        return
    try:
        overrides = [a for a in arguments if a != "--cfg"]
        cfg = _composed(name, overrides)
        if "--cfg" in arguments:
            print(OmegaConf.to_yaml(_stored(cfg.resume, overrides) if cfg.get("resume") else cfg))
            return
        run(cfg, overrides)
    except (UserError, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        text = str(error) if isinstance(error, UserError) else one_line(error)
        for line in text.splitlines() if not repeats_errors() else ():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if is_local_zero():
            print("interrupted", file=sys.stderr)
        sys.exit(130)
