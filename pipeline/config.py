"""From a composed configuration to built parts. Floor 4.

The signature is the schema: every `_target_` node is checked against the annotations of what it
names before anything is built, and all problems are reported together.
"""

import functools
import inspect
import typing
from collections.abc import Iterator
from typing import Any

import hydra
import pytorch_lightning as pl
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import (
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)

from pipeline.data.datamodule import EpisodicDataModule
from pipeline.errors import UserError
from pipeline.learners.base import MetaLearner
from pipeline.learners.gradient import GradientLearner

_BUILT_IN = {"backbone", "in_channels", "image_size", "source", "n_way", "params", "cache_dir"}
"""Arguments that `build_*` or a partial application gives, so that no YAML has to."""


def check(cfg: DictConfig) -> None:
    """Check every node of a resolved configuration.

    Raises:
        UserError: one line for each problem, naming key, value found and what is allowed.
    """
    missing = [f"{key}: needs a value (none is given)" for key in OmegaConf.missing_keys(cfg)]
    if missing:
        raise UserError("\n".join(sorted(missing)))
    problems = list(_node_problems(cfg, ""))
    if not problems:
        problems = list(_cross_field_problems(cfg))
    if problems:
        raise UserError("\n".join(problems))


def _node_problems(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield from _signature_problems(node, path)
        for key in node:
            yield from _node_problems(node[key], f"{path}.{key!s}" if path else str(key))
    elif isinstance(node, ListConfig):
        for i, item in enumerate(node):
            yield from _node_problems(item, f"{path}[{i}]")


def _parameters(target: Any) -> dict[str, inspect.Parameter]:
    hints = _hints(target)
    return {
        name: p.replace(annotation=hints.get(name, inspect.Parameter.empty))
        for name, p in inspect.signature(target).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def _hints(target: Any) -> dict[str, Any]:
    try:
        function = target.__init__ if inspect.isclass(target) else target
        if hasattr(target, "__dataclass_fields__"):
            function = target
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # forward references of other libraries
        return {}


def _signature_problems(node: DictConfig, path: str) -> Iterator[str]:
    try:
        target = hydra.utils.get_object(node._target_)
    except Exception as error:  # whatever an import of the user's own module raises
        yield f"{path}._target_: {node._target_!r} cannot be imported ({_first_line(error)})"
        return
    known = _parameters(target)
    if path == "data":  # an image source and the episodes drawn from it share one flat node
        known = _parameters(EpisodicDataModule) | known
    given = {str(k): node[k] for k in node if not str(k).startswith("_")}
    for key, value in given.items():
        if key not in known:
            allowed = ", ".join(sorted(set(known) - _BUILT_IN))
            yield f"{path}.{key}: unknown key; allowed are {allowed}"
        elif OmegaConf.is_interpolation(node, key):
            continue  # what it points to is checked where it stands
        elif problem := _value_problem(value, known[key].annotation):
            yield f"{path}.{key}: found {_plain(value)!r}; {problem}"
    for key, parameter in known.items():
        needed = parameter.default is parameter.empty and key not in _BUILT_IN
        if needed and key not in given and not node.get("_partial_"):
            yield f"{path}.{key}: needs a value (none is given)"


def _value_problem(value: Any, annotation: Any) -> str | None:
    if annotation is inspect.Parameter.empty or (
        isinstance(value, DictConfig) and "_target_" in value
    ):
        return None
    plain = _plain(value)
    try:
        adapter = _adapter(annotation)
    except (PydanticSchemaGenerationError, PydanticUserError, NameError, TypeError):
        return None  # an annotation of another library that says nothing checkable
    try:
        parsed = adapter.validate_python(plain)
    except ValidationError as error:
        return " or ".join(dict.fromkeys(e["msg"] for e in error.errors()))
    if isinstance(plain, bool | str) and type(parsed) is not type(plain):
        return f"should be {getattr(annotation, '__name__', annotation)}"  # no silent conversion
    return None


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _cross_field_problems(cfg: DictConfig) -> Iterator[str]:
    if "learner" not in cfg or "data" not in cfg:
        return
    learner = hydra.utils.get_class(cfg.learner._target_)
    if issubclass(learner, GradientLearner):
        ways = cfg.data.train_n_way
        if ways != cfg.data.n_way:
            yield (
                f"data.train_n_way: found {_plain(ways)}, but the head of {learner.__name__} has "
                f"data.n_way={cfg.data.n_way} outputs; both must be the same number"
            )
    optimizer = cfg.learner.get("optimizer")
    if optimizer and isinstance(optimizer.get("lr"), int | float) and optimizer.lr <= 0:
        yield f"learner.optimizer.lr: found {optimizer.lr}; must be greater than 0"
    for name in ("mean", "std"):
        if len(cfg.data[name]) not in (1, 3):
            yield f"data.{name}: found {_plain(cfg.data[name])}; give one number or one a channel"


def build_data(data: DictConfig) -> EpisodicDataModule:
    """The data module of a checked `data` node: an image source and the episodes drawn from it."""
    episodic = {k: data[k] for k in data if k in _parameters(EpisodicDataModule)}
    source = {k: data[k] for k in data if k not in episodic}
    parts = _instantiate(OmegaConf.create(episodic))
    return EpisodicDataModule(_instantiate(source), **parts)


def with_source(data: DictConfig, other: DictConfig, **changes: Any) -> DictConfig:
    """The images of `other` under the episodic settings of `data`."""
    episodic = _parameters(EpisodicDataModule)
    kept = {k: data[k] for k in data if k in episodic}
    return OmegaConf.create(kept | {k: other[k] for k in other if k not in episodic} | changes)


def build_learner(cfg: DictConfig, image_shape: tuple[int, int, int]) -> MetaLearner:
    """The learner of a checked configuration, with its backbone made for (C, H, W) images."""
    learner = hydra.utils.get_class(cfg.learner._target_)
    supplied: dict[str, Any] = {}
    wanted = _parameters(learner)
    if "backbone" in wanted:
        channels, height, width = image_shape
        if height != width:
            raise UserError(f"data.image_shape: images must be square, found {height}x{width}")
        has = _parameters(hydra.utils.get_object(cfg.backbone._target_))
        sizes = {"in_channels": channels, "image_size": height}
        supplied["backbone"] = _instantiate(
            cfg.backbone, **{k: v for k, v in sizes.items() if k in has}
        )
    if "n_way" in wanted:
        supplied["n_way"] = cfg.data.n_way
    return _instantiate(cfg.learner, **supplied)


def build_trainer_options(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of `pytorch_lightning.Trainer` from the trainer group, checked by name.

    Raises:
        UserError: naming the first key that Trainer does not have.
    """
    options = typing.cast(dict[str, Any], OmegaConf.to_container(cfg.trainer, resolve=True))
    allowed = inspect.signature(pl.Trainer).parameters
    for key in options:
        if key not in allowed:
            raise UserError(f"trainer.{key}: unknown key; allowed are {', '.join(allowed)}")
    return options


def _instantiate(node: Any, **arguments: Any) -> Any:
    """Build a node; a constructor's own word about bad input is not wrapped in Hydra's."""
    try:
        return hydra.utils.instantiate(node, **arguments, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
