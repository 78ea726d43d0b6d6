"""From a composed configuration to built parts. Floor 4.

The signature is the schema: every `_target_` node is checked against the annotations of what it
names before anything is built, and all problems are reported together.
"""

import logging
from collections.abc import Iterator
from typing import Any

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from pipeline.data.loaders import EpisodeLoaders
from pipeline.errors import UserError
from pipeline.heads.base import Head
from pipeline.keys import GROUPS, ROOT
from pipeline.learners.base import MetaLearner
from pipeline.signature import parameters, plain, value_problem
from pipeline.sources import (
    data_module,
    data_problems,
    episodic_keys,
    target_problems,
    unfit_learner,
)
from pipeline.trainer import trainer_problems

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it raises what it logs

_SUPPLIED = {
    "data": {"source", "cache_dir"},
    "backbone": {"in_channels", "image_size"},
    "learner": {"backbone", "n_way"},
}
"""Arguments that `build_*` gives, so that no YAML has to; elsewhere a partial application does."""
_PARTIAL = {"params", "optimizer"}


def check(cfg: DictConfig) -> None:
    """Check every node of a resolved configuration.

    Raises:
        UserError: one line for each problem, naming key, value found and what is allowed.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    problems = [f"{key}: needs a value (none is given)" for key in missing]
    problems += _node_problems(cfg, "")
    problems += [*_root_problems(cfg, "train"), *trainer_problems(cfg.trainer)]
    if unfit := unfit_learner(cfg):
        problems = [unfit]
    if not problems:
        problems = list(_cross_field_problems(cfg))
    if problems:
        raise UserError("\n".join(problems))


def check_data(cfg: DictConfig) -> None:
    """Check the `data` node of a resolved configuration alone.

    Raises:
        UserError: one line for each problem.
    """
    missing = sorted(key for key in OmegaConf.missing_keys(cfg) if key.startswith("data."))
    problems = [f"{key}: needs a value (none is given)" for key in missing]
    problems += _node_problems(cfg.data, "data")
    if problems or (problems := list(data_problems(cfg.data))):
        raise UserError("\n".join(problems))


def check_root(cfg: DictConfig, command: str) -> None:
    """Check the keys of a command that belong to no group, and its head.

    Raises:
        UserError: one line for each problem.
    """
    missing = sorted(str(key) for key in cfg if OmegaConf.is_missing(cfg, key))
    problems = [f"{key}: needs a value (none is given)" for key in missing]
    problems += _root_problems(cfg, command)
    for group in sorted(GROUPS[command] & cfg.keys()):
        if isinstance(cfg[group], DictConfig) and "_target_" not in cfg[group]:
            problems.append(f"{group}: found {', '.join(cfg[group])} alone; name the {group} too")
    for group in ("backbone", "head"):
        if isinstance(cfg.get(group), DictConfig):
            problems += _node_problems(cfg[group], group)
    if problems:
        raise UserError("\n".join(problems))


def _root_problems(cfg: DictConfig, command: str) -> Iterator[str]:
    known = ROOT[command]
    allowed = known.keys() | GROUPS[command]
    for key in sorted(map(str, cfg.keys() - allowed)):
        yield f"{key}: unknown key; allowed are {', '.join(sorted(allowed))}"
    for key, annotation in known.items():
        if OmegaConf.is_missing(cfg, key):
            continue  # said already
        if key not in cfg:
            yield f"{key}: needs a value (none is given)"
        elif problem := value_problem(cfg[key], annotation):
            yield f"{key}: found {plain(cfg[key])!r}; {problem}"


def _node_problems(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield from _signature_problems(node, path)
        for key in (k for k in node if not OmegaConf.is_missing(node, k)):
            yield from _node_problems(node[key], f"{path}.{key!s}" if path else str(key))
    elif isinstance(node, ListConfig):
        for i, item in enumerate(node):
            yield from _node_problems(item, f"{path}[{i}]")


def _signature_problems(node: DictConfig, path: str) -> Iterator[str]:
    try:
        target = hydra.utils.get_object(node._target_)
        known = parameters(target)
    except Exception as error:  # importing the user's own module may raise anything at all
        yield f"{path}._target_: {node._target_!r} cannot be imported ({_first_line(error)})"
        return
    if path == "data":  # an image source and the episodes drawn from it share one flat node
        known = episodic_keys(node) | known
    supplied = _SUPPLIED.get(path, _PARTIAL)
    given = [str(k) for k in node if not str(k).startswith("_")]
    for key in given:
        if OmegaConf.is_missing(node, key):
            continue
        value = node[key]
        if key not in known or (key in supplied and key != "cache_dir"):
            allowed = ", ".join(sorted(set(known) - supplied))
            yield f"{path}.{key}: unknown key; allowed are {allowed}"
        elif OmegaConf.is_interpolation(node, key):
            continue  # what it points to is checked where it stands
        elif problem := value_problem(value, known[key].annotation):
            yield f"{path}.{key}: found {plain(value)!r}; {problem}"
    for key, parameter in known.items():
        needed = parameter.default is parameter.empty and key not in supplied
        if needed and key not in given and not node.get("_partial_"):
            yield f"{path}.{key}: needs a value (none is given)"


def _cross_field_problems(cfg: DictConfig) -> Iterator[str]:
    learner: type[MetaLearner] = hydra.utils.get_class(cfg.learner._target_)
    ways = cfg.data.train_n_way
    if "n_way" in parameters(learner) and ways != cfg.data.n_way:
        yield (
            f"data.train_n_way: found {plain(ways)}, but {learner.__name__} is built for "
            f"data.n_way={cfg.data.n_way} classes; both must be the same number"
        )
    yield from data_problems(cfg.data)
    yield from target_problems(cfg)
    plain_pixels = cfg.data.get("mean") in (None, [0.0]) and cfg.data.get("std") in (None, [1.0])
    if "backbone" in parameters(learner) and standardises(cfg.backbone) and not plain_pixels:
        yield (
            f"data.mean, data.std: found {plain(cfg.data.mean)}, {plain(cfg.data.std)}, but "
            f"{cfg.backbone._target_.rpartition('.')[2]} standardises images by itself; give [0.0] "
            "and [1.0]"
        )
    on_images = learner.trains_on == "images"
    if on_images != bool(number := cfg.data.get("images_per_batch")):
        yield (
            f"data.images_per_batch: found {number}, but {learner.__name__} trains on "
            f"{learner.trains_on}; {'give a number' if on_images else 'must be null'}"
        )
    optimizer = cfg.learner.get("optimizer")
    if not optimizer and not cfg.test:
        yield f"test: found False, but {learner.__name__} has no optimizer: nothing would be done"
    if optimizer and isinstance(optimizer.get("lr"), int | float) and optimizer.lr <= 0:
        yield f"learner.optimizer.lr: found {optimizer.lr}; must be greater than 0"
    batches, accumulated = cfg.data.batches_per_epoch, cfg.trainer.accumulate_grad_batches
    steps, odd = batches // accumulated, batches % accumulated
    if odd:
        yield (
            f"data.batches_per_epoch: found {batches}; must be a multiple of "
            f"trainer.accumulate_grad_batches={accumulated}"
        )
    elif cfg.trainer.max_steps > steps and cfg.trainer.max_steps % steps:
        yield (
            f"trainer.max_steps: found {cfg.trainer.max_steps}; must be a multiple of the "
            f"{steps} steps between validations (data.batches_per_epoch), or fewer"
        )


def build_data(data: DictConfig) -> EpisodeLoaders:
    """The data module of a checked `data` node: a source and the episodes drawn from it."""
    keys = episodic_keys(data)
    episodic = {k: data[k] for k in data if k in keys}
    source = {k: data[k] for k in data if k not in episodic}
    parts = _instantiate(OmegaConf.create(episodic))
    return data_module(data)(_instantiate(OmegaConf.create(source)), **parts)


def build_head(head: DictConfig) -> Head:
    """The head of a checked `head` node."""
    built: Head = _instantiate(head)
    return built


def build_learner(
    cfg: DictConfig, image_shape: tuple[int, int, int], pretrained: bool = True
) -> MetaLearner:
    """The learner of a checked configuration, with its backbone made for (C, H, W) images.

    Args:
        pretrained: false if a checkpoint follows: weights that it replaces are not fetched.
    """
    learner = hydra.utils.get_class(cfg.learner._target_)
    supplied: dict[str, Any] = {}
    wanted = parameters(learner)
    if "backbone" in wanted:
        channels, height, width = image_shape
        if height != width:
            raise UserError(f"data.image_shape: images must be square, found {height}x{width}")
        has = parameters(hydra.utils.get_object(cfg.backbone._target_))
        given: dict[str, Any] = {"in_channels": channels, "image_size": height}
        if not pretrained:
            given["weights"] = None
        supplied["backbone"] = _instantiate(
            cfg.backbone, **{k: v for k, v in given.items() if k in has}
        )
        _try_out(supplied["backbone"], image_shape)
    if "n_way" in wanted:
        supplied["n_way"] = cfg.data.n_way
    built: MetaLearner = _instantiate(cfg.learner, **supplied)
    try:
        built.configure_optimizers()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"learner.optimizer, learner.scheduler: {_first_line(error)}") from error
    return built


def backbone_label(cfg: DictConfig) -> str:
    """Name of the network for tables, as papers write it: Conv4-64; empty if there is none."""
    if "backbone" not in parameters(hydra.utils.get_class(cfg.learner._target_)):
        return ""
    node = cfg.backbone
    name = node.name if "name" in node else node._target_.rpartition(".")[2]
    return f"{name}-{node.width}" if "width" in node else name


def standardises(backbone: DictConfig) -> bool:
    """Whether a network takes pixels in 0..1, standardising them by itself."""
    return hasattr(hydra.utils.get_object(backbone._target_), "standardises")


def _try_out(backbone: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Some networks take images of certain sizes only."""
    try:
        with torch.inference_mode():
            backbone.eval()(torch.zeros(2, *image_shape))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"backbone: {type(backbone).__name__} does not take images of "
            f"{'x'.join(map(str, image_shape))} ({_first_line(error)}); data.image_shape=[C,H,W] "
            "resizes them"
        ) from error
    backbone.train()


def _instantiate(node: Any, **arguments: Any) -> Any:
    """Build a node; a constructor's own word about bad input is not wrapped in Hydra's."""
    try:
        return hydra.utils.instantiate(node, **arguments, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"{node._target_}: {_first_line(error.__cause__ or error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
