"""Composes configurations with Hydra and says what is wrong with an override. Floor 4.

Hydra's compose API, not its decorator: the decorator exits with code 1, prints several lines, stops
at the first bad override and makes an outputs folder. Imports nothing heavy.
"""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"


def compose_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration `conf/NAME.yaml` with overrides applied.

    Raises:
        UserError: one line for each override that does not fit.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return compose(name, list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            problems = _bad_overrides(name, overrides) or [one_line(error)]
            raise UserError("\n".join(problems)) from error


def _bad_overrides(name: str, overrides: Sequence[str]) -> list[str]:
    """Every override that fails on top of those that hold; groups first, values depend on them."""
    groups = {p.name for p in CONF.iterdir() if p.is_dir()}
    ordered = sorted(overrides, key=lambda o: o.split("=")[0].lstrip("+~") not in groups)
    good: list[str] = []
    problems = []
    for override in ordered:
        try:
            compose(name, [*good, override])
            good.append(override)
        except (HydraException, OmegaConfBaseException) as error:
            problems.append(f"{override}: {one_line(error)}")
    return problems


def one_line(error: BaseException) -> str:
    parts = [line.strip() for line in str(error).splitlines() if line.strip()]
    parts = [p for p in parts if not p.startswith(("full_key", "object_type", "reference_type"))]
    return "; ".join(dict.fromkeys(parts))
