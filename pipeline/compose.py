"""Composes configurations with Hydra and says what is wrong with an override. Floor 4.

Hydra's compose API, not its decorator: the decorator exits with code 1, prints several lines, stops
at the first bad override and makes an outputs folder. Imports nothing heavy.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"
WITHOUT_GROUPS = {"report", "survey", "ui"}
"""Commands whose keys are all plain: the `experiment` of a report is none of conf/experiment."""
_ADDED_GROUPS = {"train": {"scheduler"}, "sweep": {"scheduler"}, "evaluate": {"data"}}
"""Groups that a command has not, and takes with a `+`."""
_REFUSED = (HydraException, OmegaConfBaseException, ValueError)
"""What Hydra raises for an override that does not fit; ValueError for GROUP=null."""


class OverrideError(UserError):
    """Some overrides do not fit; `fitting` are the others."""

    def __init__(self, problems: Sequence[str], fitting: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.fitting = fitting


def compose_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration `conf/NAME.yaml` with overrides applied.

    Raises:
        OverrideError: one line for each override that does not fit.
    """
    with _searching(name):
        try:
            return compose(name, list(overrides))
        except _REFUSED as error:
            problems, fitting = _try_each(name, overrides)
            raise OverrideError(problems or [one_line(error)], fitting) from error


@contextmanager
def _searching(name: str) -> Iterator[None]:
    """Hydra where it finds the command's configuration, and the groups if it has any."""
    GlobalHydra.instance().clear()
    if name in WITHOUT_GROUPS:
        ConfigStore.instance().store(name, OmegaConf.load(CONF / f"{name}.yaml"))
        with initialize(None, version_base="1.3"):
            yield
    else:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield


def parse_override(override: str) -> tuple[str, Any]:
    """`KEY=VALUE` as Hydra reads it.

    Raises:
        UserError: if it is none.
    """
    try:
        parsed = OverridesParser.create().parse_override(override)
        return parsed.key_or_group, parsed.value()
    except HydraException as error:
        raise UserError(f"{override}: {one_line(error)}") from error


def _try_each(name: str, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is wrong with which override, and those that hold; groups first, values need them."""
    groups = _groups(name)
    ordered = sorted(overrides, key=lambda o: _split(o)[0] not in groups)
    fitting: list[str] = []
    problems = []
    for override in ordered:
        try:
            compose(name, [*fitting, override])
            fitting.append(override)
        except _REFUSED as error:
            problems.append(f"{override}: {_explain(name, fitting, override, error)}")
    return problems, fitting


def _groups(name: str) -> dict[str, list[str]]:
    """The options of every group of a command."""
    if name in WITHOUT_GROUPS:
        return {}
    folders = sorted(p for p in CONF.iterdir() if p.is_dir())
    return {p.name: sorted(option.stem for option in p.glob("*.yaml")) for p in folders}


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("+~").partition("=")
    return key, value


def _explain(name: str, fitting: list[str], override: str, error: Exception) -> str:
    """Names what is allowed in place of an unknown option or key."""
    key, value = _split(override)
    if (options := _groups(name).get(key)) and value not in options:
        return f"no such option; {key} can be {', '.join(options)}"
    unknown = isinstance(error, ConfigCompositionException) and "Could not override" in str(error)
    if options and unknown:
        taken = key in _ADDED_GROUPS.get(name, ())
        return f"write +{key}={value}" if taken else f"{name} takes no {key}"
    if options and override.startswith("+"):
        return f"write {key}={value}"
    if unknown:
        parent, _, last = key.rpartition(".")
        node = (
            OmegaConf.select(compose(name, fitting), parent) if parent else compose(name, fitting)
        )
        if OmegaConf.is_dict(node):
            allowed = ", ".join(sorted(str(k) for k in node if not str(k).startswith("_")))
            return f"unknown key {last!r}; {parent or name} has {allowed}"
    return one_line(error)


def one_line(error: BaseException) -> str:
    """The message of a Hydra or OmegaConf error without its line breaks and object dumps."""
    if isinstance(error, OverrideParseException):
        return "cannot be read; a value with signs or spaces needs quotes: 'KEY=\"VALUE\"'"
    parts = [line.strip() for line in str(error).splitlines() if line.strip()]
    parts = [p for p in parts if not p.startswith(("full_key", "object_type", "reference_type"))]
    return "; ".join(dict.fromkeys(parts))
