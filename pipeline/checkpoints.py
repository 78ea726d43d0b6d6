"""Checkpoints that say what they are: weights with the configuration that made them. Floor 4."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from pipeline.compose import CONF
from pipeline.errors import UserError
from pipeline.learners.base import MetaLearner

KEY = "pipeline_config"


class StoreConfig(Callback):
    """Adds the resolved configuration to every checkpoint."""

    def __init__(self, resolved: dict[str, Any]) -> None:
        self.resolved = resolved

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Plain containers, so that the file loads with `weights_only=True`."""
        checkpoint[KEY] = self.resolved


def _read(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint: no file {path}") from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint: {path} is not a readable checkpoint") from error
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        raise UserError(f"checkpoint: {path} was not written by this pipeline")
    return checkpoint


def restore_config(path: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that a checkpoint was trained with, `KEY=VALUE` overrides applied.

    Raises:
        UserError: if the file is none of ours, or an override names a group or an unknown key.
    """
    cfg = OmegaConf.create(_read(path)[KEY])
    OmegaConf.set_struct(cfg, True)
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "resume":
            continue
        if (CONF / key).is_dir():
            raise UserError(f"{override}: a resumed run keeps its {key}; start a new run for that")
        if OmegaConf.select(cfg, key, throw_on_missing=False) is None and key not in cfg:
            raise UserError(f"{override}: unknown key of the stored configuration")
        OmegaConf.update(cfg, key, _parse(value))
    return cfg


def _parse(value: str) -> Any:
    return OmegaConf.from_dotlist([f"value={value}"])["value"]


def load_weights(learner: MetaLearner, path: Path) -> None:
    """Copy the weights of a checkpoint into a learner.

    Raises:
        UserError: if they are of another learner, backbone or size.
    """
    checkpoint = _read(path)
    try:
        learner.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        trained = checkpoint[KEY]["learner"]["_target_"].rpartition(".")[2]
        reason = str(error).splitlines()[1].strip()
        raise UserError(
            f"checkpoint: {path} holds a {trained}, which does not fit {learner.label}: {reason}"
        ) from error
