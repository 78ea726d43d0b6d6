"""The keys of each command that stand in no group of conf/, with their types. Floor 4."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Lt, MinLen

from pipeline.annotations import ModelAlias, ModelName, PositiveInt, Published, PublishedError, Ways

ROOT: dict[str, dict[str, Any]] = {
    "train": {
        "seed": Annotated[int, Ge(0), Lt(2**32)],
        "compile": bool,
        "test": bool,
        "test_k_shot": Annotated[list[PositiveInt], MinLen(1)],
        "also_test": list[str | dict[str, Any]],
        "published": list[Published | PublishedError],
        "experiment_name": Annotated[str, MinLen(1)],
        "run_name": str | None,
        "resume": str | None,
        "init_from": str | None,
    },
    "evaluate": {
        "run": str | None,
        "checkpoint": str | None,
        "n_way": Ways | None,
        "k_shot": PositiveInt | Annotated[list[PositiveInt], MinLen(1)] | None,
        "n_query": PositiveInt | None,
        "episodes": PositiveInt | None,
        "also_test": list[str | dict[str, Any]] | None,
        "inside": bool,
        "inside_episodes": Annotated[int, Ge(2)],
    },
    "adapt": {
        "support": str,
        "query": str | None,
        "run": str | None,
        "checkpoint": str | None,
        "image_size": Annotated[int, Ge(8), Le(1024)] | None,
        "skip_bad": bool,
        "reject": Annotated[float, Ge(0), Lt(1)],
        "out": str | None,
        "export": list[Literal["onnx", "pt2"]],
        "name": ModelName | None,
        "alias": ModelAlias | None,
        "experiment_name": Annotated[str, MinLen(1)],
    },
    "register": {
        "run": str | None,
        "checkpoint": str | None,
        "image_size": Annotated[int, Ge(8), Le(1024)] | None,
        "name": ModelName,
        "alias": ModelAlias | None,
        "experiment_name": Annotated[str, MinLen(1)],
    },
    "report": {
        "experiment": str | None,
        "runs": Annotated[list[str], MinLen(1)] | None,
        "study": str | None,
        "test_set": str | None,
        "n_way": Ways | None,
        "k_shot": PositiveInt | None,
        "episodes": PositiveInt | None,
        "out": str | None,
    },
    "survey": {
        "learners": Annotated[list[str], MinLen(1)] | None,
        "heads": list[str] | None,
        "heads_on": str,
        "images": dict[str, PositiveInt],
        "half": dict[str, str],
        "data": dict[str, dict[str, Any]],
        "tests": Annotated[list[tuple[Ways, PositiveInt]], MinLen(1)],
        "episodes": dict[str, PositiveInt],
        "overrides": dict[str, Any],
        "workers": PositiveInt | Literal["auto"],
        "experiment_name": Annotated[str, MinLen(1)],
        "out": str | None,
    },
    "demo": {
        "run": str | None,
        "checkpoint": str | None,
        "image_size": Annotated[int, Ge(8), Le(1024)] | None,
        "reject": Annotated[float, Ge(0), Lt(1)],
        "host": Annotated[str, MinLen(1)],
        "port": Annotated[int, Ge(1), Le(65535)],
        "max_classes": Annotated[int, Ge(2), Le(50)],
        "max_photos": Annotated[int, Ge(1), Le(1000)],
        "max_mb": Annotated[int, Ge(1), Le(64)],
    },
    "ui": {"port": Annotated[int, Ge(1), Le(65535)]},
}
"""Keys of the commands that belong to no group."""
GROUPS = {"train": {"data", "learner", "backbone", "trainer"}, "evaluate": {"data", "head"},
          "adapt": {"backbone", "head"}, "register": {"backbone", "head"},
          "demo": {"backbone", "head"},
           "report": set(), "survey": set(), "ui": set()}  # fmt: skip
