"""Checkpoints that say what they are: weights with the configuration that made them. Floor 4."""

import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from pipeline.compose import parse_override
from pipeline.errors import UserError
from pipeline.learners.base import MetaLearner
from pipeline.seen import Seen
from pipeline.stored import stored_config

KEY = "pipeline"
_CAN_CHANGE = ("data.root", "data.split_file", "data.num_workers", "data.test_episodes",
               "trainer.accelerator", "test_k_shot", "also_test", "published")  # fmt: skip
"""What a resumed run may set anew: nothing that training depends on."""
_ADDED = {"init_from": None}
"""Root keys that older checkpoints lack."""
_NETWORKS = ("backbone.", "net.body.")
"""Where a learner keeps its network: an embedding learner and a gradient learner."""


class Provenance(Callback):
    """Adds configuration and what was seen to every checkpoint, and lets a run go on elsewhere."""

    def __init__(self, resolved: dict[str, Any], seen: Sequence[Seen]) -> None:
        self.resolved, self.seen = resolved, seen

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Plain containers, so that the file loads with `weights_only=True`."""
        seen = [each._asdict() for each in self.seen]
        checkpoint[KEY] = {"config": self.resolved, "seen": seen}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Where the folder of checkpoints is now; in another one Lightning forgets the best."""
        assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)
        here = str(trainer.checkpoint_callback.dirpath)
        for state in checkpoint["callbacks"].values():
            if before := state.get("dirpath"):
                state.update(_moved(state, before, here))


def _moved(value: Any, before: str, here: str) -> Any:
    """A container with every path below `before` below `here` instead."""
    if isinstance(value, dict):
        return {_moved(k, before, here): _moved(v, before, here) for k, v in value.items()}
    return value.replace(before, here) if isinstance(value, str) else value


def bring(source: Path, target: Path) -> None:
    """Copy a checkpoint to where it is not yet, whole or not at all."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(source, part)
        part.replace(target)


def read_file(path: Path, key: str, what: str) -> dict[str, Any]:
    """Read a file of tensors and plain containers that this pipeline wrote; executes nothing.

    Args:
        key: that such files hold.
        what: they are, for errors.

    Raises:
        UserError: if there is none, or it is something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd in a file is an error, or fine
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{what}: no file {path}") from error
    except pickle.UnpicklingError as error:  # also what would run code of its own
        raise UserError(
            f"{what}: {path} is not a readable {what}: it holds more than tensors and plain "
            "containers, or is damaged; nothing in it was run"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{what}: {path} is not a readable {what}") from error
    if not isinstance(found, dict) or key not in found:
        raise UserError(f"{what}: {path} was not written by this pipeline")
    return found


@contextmanager
def whole(path: Path, what: str) -> Iterator[None]:
    """What does not fit together in a file of ours is a line.

    Raises:
        UserError: for entries that are missing or do not fit.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, RuntimeError, OmegaConfBaseException) as error:
        reason = str(error).strip().splitlines()[-1].strip() or type(error).__name__
        raise UserError(f"{what}: {path} is damaged ({reason})") from error


def _read(path: Path) -> dict[str, Any]:
    return read_file(path, KEY, "checkpoint")


def restore_config(path: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that a checkpoint was trained with, `KEY=VALUE` overrides applied.

    Raises:
        UserError: if the file is none of ours, or for each override of what cannot change.
    """
    cfg = stored_config(_ADDED | _read(path)[KEY]["config"], path)
    pairs = [pair for pair in map(parse_override, overrides) if pair[0] != "resume"]
    refused = [
        f"{key}={value}: a resumed run keeps its {key}; what can change is {', '.join(_CAN_CHANGE)}"
        for key, value in pairs
        if key not in _CAN_CHANGE
    ]
    if refused:
        raise UserError("\n".join(refused))
    for key, value in pairs:
        OmegaConf.update(cfg, key, value)
    return cfg


def stored_seen(path: Path) -> list[Seen]:
    """What the training of a checkpoint has seen: its own data, then that of what it started from.

    Raises:
        UserError: if the file is none of ours.
    """
    seen = _read(path)[KEY]["seen"]
    return [Seen(**each) for each in (seen if isinstance(seen, list) else [seen])]


def load_weights(learner: MetaLearner, path: Path) -> int:
    """Copy the weights of a checkpoint into a learner.

    Returns:
        The training step that they were saved after.

    Raises:
        UserError: if they are of another learner, backbone or size.
    """
    checkpoint = _read(path)
    try:
        learner.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        trained = checkpoint[KEY]["config"]["learner"]["_target_"].rpartition(".")[2]
        reason = str(error).splitlines()[1].strip()
        raise UserError(
            f"checkpoint: {path} holds a {trained}, which does not fit {learner.label}: {reason}"
        ) from error
    return checkpoint["global_step"]


def start_from(learner: MetaLearner, path: Path) -> str:
    """Copy a checkpoint's network into a learner's, where names and shapes fit; no more than that.

    Returns:
        One line that says how much was copied.

    Raises:
        UserError: if nothing fits.
    """
    checkpoint = _read(path)
    given, own = _network(checkpoint["state_dict"]), _network(learner.state_dict())
    fitting = {k: v for k, v in given.items() if k in own and v.shape == own[k].shape}
    trained = checkpoint[KEY]["config"]
    name = trained["learner"]["_target_"].rpartition(".")[2]
    if not any(v.dim() for v in fitting.values()):  # counters fit anywhere
        raise UserError(
            f"init_from: no weight of the {name} in {path} fits the network of this "
            f"{learner.label}; it has backbone {trained['backbone']}"
        )
    for key, value in fitting.items():
        own[key].copy_(value)
    step = checkpoint["global_step"]
    return f"init_from: {len(fitting)} of {len(own)} tensors of the network, {name} at step {step}"


def _network(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a learner's network by their names in it."""
    found = ((prefix, key) for key in state for prefix in _NETWORKS if key.startswith(prefix))
    return {key.removeprefix(prefix): state[key] for prefix, key in found}
