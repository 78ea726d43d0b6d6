"""The trainer group of a configuration: what it may hold, and what Lightning gets. Floor 4."""

import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,  # which it takes from lightning_fabric
)

from pipeline.annotations import PositiveInt
from pipeline.errors import UserError
from pipeline.processes import check_number
from pipeline.signature import parameters, plain, value_problem

_RESERVED = {"logger", "callbacks", "max_epochs", "enable_progress_bar", "enable_checkpointing",
             "enable_model_summary", "use_distributed_sampler", "num_sanity_val_steps",
             "default_root_dir", "fast_dev_run", "inference_mode", "limit_train_batches",
             "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches",
             "check_val_every_n_epoch", "val_check_interval", "reload_dataloaders_every_n_epochs",
             "barebones", "sync_batchnorm"}  # fmt: skip
"""Arguments of Trainer that the commands set themselves, or data.batches_per_epoch stands for."""

_NARROWER: dict[str, Any] = {
    "max_steps": PositiveInt,
    "accumulate_grad_batches": PositiveInt,
    "precision": Literal["32-true", "16-mixed", "bf16-mixed"],  # parameters stay float32
}
"""What these arguments of Trainer may be here."""


def trainer_problems(trainer: DictConfig) -> Iterator[str]:
    """One line for each key that is unknown, the pipeline's own, or of another type."""
    known = {k: p.annotation for k, p in parameters(pl.Trainer).items() if k not in _RESERVED}
    known |= _NARROWER
    for name, value in trainer.items():
        key = str(name)
        if key in _RESERVED:
            yield f"trainer.{key}: is set by the pipeline"
        elif key not in known:
            yield f"trainer.{key}: unknown key; allowed are {', '.join(known)}"
        elif problem := value_problem(value, known[key]):
            yield f"trainer.{key}: found {plain(value)!r}; {problem}"
    for key in sorted(_NARROWER.keys() - trainer.keys()):
        yield f"trainer.{key}: needs a value (none is given)"


def build_trainer_options(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of `pytorch_lightning.Trainer` from the checked trainer group.

    `devices` is a number where all of them were asked for: a resumed run has as many processes.

    Raises:
        UserError: if a Trainer cannot be made of them here (a GPU is asked for and there is none),
            if another number of processes was started, or if some would validate nothing.
    """
    options = typing.cast(dict[str, Any], OmegaConf.to_container(cfg.trainer, resolve=True))
    try:
        trainer = pl.Trainer(
            **options, logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    if options.get("devices", "auto") in ("auto", "-1", -1):
        options["devices"] = trainer.num_devices
    check_number(trainer)
    if cfg.data.val_episodes < (processes := trainer.num_devices * trainer.num_nodes):
        raise UserError(
            f"data.val_episodes: found {cfg.data.val_episodes}; needs at least one for each of the "
            f"{processes} processes"
        )
    return options
