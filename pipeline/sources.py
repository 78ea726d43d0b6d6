"""What a `data` node is of: images in classes, or functions with real values. Floor 4."""

from collections.abc import Iterator, Sequence
from inspect import Parameter
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from pipeline.backbones import MLP
from pipeline.data.datamodule import EpisodicDataModule
from pipeline.data.functions import FunctionFamily
from pipeline.data.regression import RegressionDataModule
from pipeline.errors import UserError
from pipeline.signature import parameters, plain


def data_module(data: DictConfig) -> type[EpisodicDataModule] | type[RegressionDataModule]:
    """What loads such data: its target decides."""
    target = hydra.utils.get_object(data._target_)
    functions = isinstance(target, type) and issubclass(target, FunctionFamily)
    return RegressionDataModule if functions else EpisodicDataModule


def episodic_keys(data: DictConfig) -> dict[str, Parameter]:
    """Keys of `data` that shape episodes; the others are those of its source."""
    return parameters(data_module(data))


def image_shape(data: DictConfig) -> tuple[int, int, int]:
    """What a learner was built for that was trained on this `data` node, as its run stored it."""
    if data_module(data) is RegressionDataModule:
        return (1, 1, 1)
    channels, height, width = data.image_shape
    return channels, height, width


def with_source(
    data: DictConfig, other: DictConfig, shape: Sequence[int] | None = None, **changes: Any
) -> DictConfig:
    """The source of `other` under the episodic settings of `data`.

    Args:
        shape: that its images are adapted to; None leaves it to `data`.

    Raises:
        UserError: if one has classes and the other real targets.
    """
    if data_module(data) is not (module := data_module(other)):
        kinds = ("classes", "real targets")[:: -1 if module is RegressionDataModule else 1]
        raise UserError(
            f"{_class_name(other)} has {kinds[0]}, but {_class_name(data)}, which this "
            f"learner is for, has {kinds[1]}"
        )
    if shape and module is EpisodicDataModule:
        changes["image_shape"] = list(shape)
    episodic = episodic_keys(data)
    kept = {k: data[k] for k in data if k in episodic}
    return OmegaConf.create(kept | {k: other[k] for k in other if k not in episodic} | changes)


def unfit_learner(cfg: DictConfig) -> str:
    """What is to be said of a learner of classes where targets are real; else nothing.

    Whatever else does not fit would only follow from it.
    """
    try:
        learner, module = hydra.utils.get_class(cfg.learner._target_), data_module(cfg.data)
    except Exception:  # whatever an import of the user's own module raises: reported elsewhere
        return ""
    if module is EpisodicDataModule or getattr(learner, "regresses", False):
        return ""
    return (
        f"learner: {learner.__name__} tells classes apart, but {_class_name(cfg.data)} has real "
        "targets; learners with an inner loop take them (maml)"
    )


def data_problems(data: DictConfig) -> Iterator[str]:
    """One line for each value that does not fit this kind of data."""
    if data_module(data) is RegressionDataModule:
        return
    for name in ("mean", "std"):
        if len(data[name]) not in (1, 3):
            yield f"data.{name}: found {plain(data[name])}; give one number or one a channel"
    if data.image_shape and data.image_shape[0] not in (1, 3):
        yield f"data.image_shape: found {plain(data.image_shape)}; channels are 1 or 3"


def target_problems(cfg: DictConfig) -> Iterator[str]:
    """One line for each part that does not fit real targets of one real argument."""
    if data_module(cfg.data) is EpisodicDataModule:
        return
    source = _class_name(cfg.data)
    if cfg.learner.get("loss", "mse") != "mse":
        yield f"learner.loss: found {cfg.learner.loss!r}, but {source} has real targets: mse"
    if hydra.utils.get_object(cfg.backbone._target_) is not MLP:
        yield (
            f"backbone: {_class_name(cfg.backbone)} takes images, but an argument of {source} is "
            "one number: backbone=mlp"
        )


def _class_name(node: DictConfig) -> str:
    return str(node._target_).rpartition(".")[2]
