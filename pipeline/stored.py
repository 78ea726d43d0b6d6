"""Configurations in files that somebody else may have written. Floor 4."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeline.errors import UserError

_PARTS = ("pipeline.learners.", "pipeline.heads.", "pipeline.data.", "pipeline.backbones",
          "pipeline.pretrained", "pipeline.inner")  # fmt: skip
"""Where the classes are that one may name."""
_KINDS = (nn.Module, Optimizer, LRScheduler)
"""What such a class may be, wherever it is; beside them sources of data, which `load`."""


def stored_config(plain: dict[str, Any], path: Path) -> DictConfig:
    """The configuration in a file that somebody else may have written.

    Hydra calls whatever a `_target_` names, so here it has to be a class that learners and data are
    made of, or an optimiser or a schedule.

    Raises:
        UserError: if one is anything else; it is not called.
    """
    cfg = OmegaConf.create(plain)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    for target in _targets(resolved):
        if not _is_part(target):
            raise UserError(
                f"{path}: its configuration names {target!r}, which is no part of a learner or of "
                "data; refused, nothing was run"
            )
    return OmegaConf.create(resolved)  # type: ignore[return-value]  # a mapping as before


def _targets(node: Any) -> Iterator[Any]:
    """Every `_target_` in nested containers."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, list):
        for each in node:
            yield from _targets(each)


def _is_part(target: Any) -> bool:
    """Of this package, or a user's own of the same kinds."""
    try:
        found = hydra.utils.get_class(target)
    except Exception:  # no name, no such module, no class: each raises its own
        return False
    package = found.__module__.partition(".")[0]
    loads = hasattr(found, "load") and package not in sys.stdlib_module_names
    return found.__module__.startswith(_PARTS) or loads or issubclass(found, _KINDS)
