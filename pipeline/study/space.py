"""What is searched: conf/space and its overrides to Optuna's suggestions. Floor 5."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import UserError

if TYPE_CHECKING:
    from optuna import Trial

Value = bool | int | float | str | None
GRID_POINTS = 5
_NUMBERS = ("low", "high", "step")


class Dimension(BaseModel):
    """One key of the configuration and the values that it may take."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    key: str
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    step: int | float | None = Field(None, gt=0)
    choices: list[Value] | None = Field(None, min_length=1)
    when: dict[str, Value] = {}

    @model_validator(mode="after")
    def _is_one(self) -> "Dimension":
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step:
                raise ValueError("choices stand alone: no low, high, log or step")
        elif self.low is None or self.high is None or self.low > self.high:
            raise ValueError("needs low <= high, or choices")
        elif self.log and (self.low <= 0 or self.step):
            raise ValueError("log needs low > 0 and takes no step")
        return self

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers."""
        return all(isinstance(v, int) for v in (self.low, self.high, self.step or 1))

    def suggest(self, trial: "Trial") -> Value:
        """The value of this trial."""
        if self.choices is not None:
            return trial.suggest_categorical(self.key, self.choices)
        assert self.low is not None
        assert self.high is not None
        if self.whole:
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return trial.suggest_int(self.key, low, high, step=step, log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)

    def bounds(self) -> list[Value]:
        """Values that show whether all of them are allowed."""
        return self.choices if self.choices is not None else [self.low, self.high]

    def grid(self) -> list[Value]:
        """All values, or five of a range without steps."""
        if self.choices is not None:
            return self.choices
        assert self.low is not None
        assert self.high is not None
        if self.whole and not self.log:
            return list(range(int(self.low), int(self.high) + 1, int(self.step or 1)))
        if self.step:
            count = int((self.high - self.low) / self.step + 1e-9) + 1
            return [self.low + i * self.step for i in range(count)]
        parts = [i / (GRID_POINTS - 1) for i in range(GRID_POINTS)]
        if self.log:
            ratio = math.log(self.high / self.low)
            values = [min(self.high, self.low * math.exp(part * ratio)) for part in parts]
        else:
            values = [self.low + part * (self.high - self.low) for part in parts]
        return list(dict.fromkeys(round(v) if self.whole else v for v in values))

    def holds(self, value: object) -> bool:
        """Whether a value lies in it."""
        if self.choices is not None:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        assert self.low is not None
        assert self.high is not None
        on_step = not self.step or math.isclose(math.remainder(value - self.low, self.step), 0,
                                                abs_tol=1e-9)  # fmt: skip
        return (
            self.low <= value <= self.high
            and on_step
            and (isinstance(value, int) or not self.whole)
        )


def dimensions(space: DictConfig, cfg: DictConfig) -> list[Dimension]:
    """The dimensions of a `space` node, whose keys are those of the configuration.

    A range of whole numbers is one of rates where the configuration has a rate.

    Raises:
        UserError: one line for each that cannot be read, or if there is none.
    """
    found: list[Dimension] = []
    problems = []
    for key, node in _leaves(space, ""):
        try:
            if isinstance(OmegaConf.select(cfg, key), float):
                node = {k: float(v) if k in _NUMBERS and type(v) is int else v
                        for k, v in node.items()}  # fmt: skip
            found.append(Dimension(key=key, **node))
        except ValidationError as error:
            for each in error.errors():
                where = ".".join(map(str, ("space", key, *each["loc"][:1])))
                given = node if isinstance(each["input"], Mapping) else each["input"]
                problems.append(
                    f"{where}: found {given}; {each['msg'].removeprefix('Value error, ')}"
                )
        except (TypeError, AttributeError):
            problems.append(f"space.{key}: found {node}; needs low and high, or choices")
    if not found and not problems:
        problems = ["space: nothing to search; add +space.KEY={low:...,high:...} for a key of "
                    "pipeline.train, or a file conf/space/LEARNER.yaml"]  # fmt: skip
    if problems:
        raise UserError("\n".join(problems))
    return found


def _leaves(node: DictConfig, path: str) -> Iterator[tuple[str, Any]]:
    for name in node:
        key, value = f"{path}{name!s}", node[name]
        nested = isinstance(value, DictConfig)
        if nested and value and not {"low", "high", "choices"} & value.keys():
            yield from _leaves(value, f"{key}.")
        else:
            yield key, OmegaConf.to_container(value) if nested else value


def suggest(trial: "Trial", space: Sequence[Dimension], cfg: DictConfig) -> dict[str, Value]:
    """Values of a trial; a dimension takes part when those that it asks for are so.

    Args:
        cfg: what keys are that are not searched.
    """
    values: dict[str, Value] = {}
    for each in space:
        if applies(each, values, cfg):
            values[each.key] = each.suggest(trial)
    return values


def applies(dimension: Dimension, values: Mapping[str, Value], cfg: DictConfig) -> bool:
    """Whether its `when` holds under values and, for other keys, the configuration."""
    return all(
        (values[key] if key in values else OmegaConf.select(cfg, key)) == wanted
        for key, wanted in dimension.when.items()
    )


def defaults(space: Sequence[Dimension], cfg: DictConfig) -> dict[str, Value] | None:
    """What the configuration itself holds, if it lies in the space."""
    values: dict[str, Value] = {}
    for each in space:
        if applies(each, values, cfg):
            value = OmegaConf.select(cfg, each.key)
            if not each.holds(value):
                return None
            values[each.key] = value
    return values


def corners(space: Sequence[Dimension]) -> list[dict[str, Value]]:
    """One dimension at a time at its bounds: configurations that must be valid."""
    return [{each.key: value} for each in space for value in each.bounds()]
