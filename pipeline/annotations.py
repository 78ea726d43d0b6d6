"""Types that say which values an argument takes; `config` checks by them. Floor 0."""

import re
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Probability = Annotated[float, Ge(0), Lt(1)]

Ways = Annotated[int, Ge(2)]
WaysRange = Ways | tuple[Ways, Ways]
"""A fixed number of classes or an inclusive range to draw it from."""
ShotsRange = PositiveInt | tuple[PositiveInt, PositiveInt]


def _model_name(name: str) -> str:
    if set(name) & set("/:") or not name.strip(" ."):
        raise PydanticCustomError("model_name", "the name of a model has no / and no :")
    return name


def _model_alias(alias: str) -> str:
    if not re.fullmatch(r"[\w-]+", alias) or re.fullmatch(r"(?i)v\d+|latest", alias):
        raise PydanticCustomError(
            "alias", "an alias has letters, digits, _ and -, and is not latest or as v1, v2"
        )
    return alias


ModelName = Annotated[str, AfterValidator(_model_name)]
"""In MLflow's registry."""
ModelAlias = Annotated[str, AfterValidator(_model_alias)]
"""Of a version there."""

Interval = tuple[float, float]
"""Its two ends."""

Measure = Literal["acc", "mse"]
"""What tasks are scored by: accuracy of classes, mean squared error of real targets."""


def better(measure: str) -> Literal["max", "min"]:
    """Which of two scores is the better one."""
    return "max" if measure == "acc" else "min"


class Published(TypedDict):
    """A value of the literature, shown beside the row of a table that it matches."""

    learner: str
    data: str
    n_way: Ways
    k_shot: PositiveInt
    accuracy: float
    """Percent."""
    source: str


class PublishedError(TypedDict):
    """The same of real targets."""

    learner: str
    data: str
    k_shot: PositiveInt
    inner_steps: NonNegativeInt
    mse: float
    source: str
