"""The signature is the schema: values are checked against the annotations of what takes them.

Floor 4.
"""

import functools
import inspect
import typing
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import (
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)


def parameters(target: Any) -> dict[str, inspect.Parameter]:
    """What a constructor or a function takes by name, annotations resolved."""
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


def value_problem(value: Any, annotation: Any) -> str | None:
    """What is wrong with a value for an argument so annotated; None if nothing is."""
    if annotation is inspect.Parameter.empty or (
        isinstance(value, DictConfig) and "_target_" in value
    ):
        return None
    found = plain(value)
    try:
        adapter = _adapter(annotation)
    except (PydanticSchemaGenerationError, PydanticUserError, NameError, TypeError):
        return None  # an annotation of another library that says nothing checkable
    try:
        parsed = adapter.validate_python(found)
    except ValidationError as error:
        return " or ".join(dict.fromkeys(e["msg"] for e in error.errors()))
    if _converted(found, parsed):
        return f"should be {getattr(annotation, '__name__', annotation)}"
    return None


def _converted(plain: Any, parsed: Any) -> bool:
    """Whether a value had to be turned into another type to fit: the user meant something else."""
    if isinstance(plain, list) and isinstance(parsed, list | tuple):
        return any(map(_converted, plain, parsed))
    if isinstance(plain, dict) and isinstance(parsed, dict):
        return any(_converted(plain[key], value) for key, value in parsed.items())
    return isinstance(plain, bool | str | float) and type(parsed) is not type(plain)


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))


def plain(value: Any) -> Any:
    """A value as it stands in YAML."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
