"""Models of a run, and MLflow's registry: logged without pickle, versioned, the newest aliased."""

import io
import sys
import tempfile
import warnings
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.tracking.run import Run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from torch import Tensor, nn

    from pipeline.classifier import Estimate, PhotoClassifier
    from pipeline.trained import Given

_PACKAGE = Path(__file__).resolve().parents[1]
_NEEDED = ("mlflow", "torch", "torchvision", "pytorch-lightning", "torchmetrics", "hydra-core",
           "omegaconf", "pydantic", "annotated-types", "typing-extensions", "numpy", "pandas",
           "pillow", "rich", "scipy")  # fmt: skip
"""What `pipeline.serving` imports; a network of timm needs that too."""
_FACTS = ("learner", "backbone", "protocol", "run", "checkpoint", "weights")
"""What of the provenance becomes tags of a version."""


class _Card(NamedTuple):
    """What there is to say of a model.

    Attributes:
        kind: its name within the run.
        loader: the module that MLflow loads it with.
        learner: the network within, which decides what packages it needs.
        example: an input, by column.
        outputs: MLflow's type of each column that it answers with.
        tags: of the version.
        text: its description.
    """

    kind: str
    loader: str
    learner: "nn.Module"
    example: Mapping[str, Sequence[Any]]
    outputs: Mapping[str, str]
    tags: Mapping[str, Any]
    text: str


def log_photo_classifier(
    run: Run,
    classifier: "PhotoClassifier",
    file: Path,
    estimate: "Estimate | None" = None,
    name: str | None = None,
    alias: str | None = "champion",
) -> str | None:
    """Log a classifier as a model of an open run and, with a name, register it.

    The model is the file, a copy of this package's code and the exact versions of what that
    imports; `pipeline.serving` loads it. Nothing is pickled, and no package is looked for.

    Args:
        run: open.
        classifier: what the file holds.
        file: written by `PhotoClassifier.save`.
        estimate: its accuracy, for the version's tags.
        name: of the registered model, which is made if there is none; None registers nothing.
        alias: that is moved to the new version; None moves none.

    Returns:
        The model's URI; None if the store did not take it, which a line on stderr has told: a
        server that is away gets it later (see `Outbox`). Nothing is raised.
    """
    names, photos = classifier.class_names, len(classifier.support_y)
    facts: dict[str, Any] = {"classes": len(names), "photos": photos}
    text = f"{_some(names)}: {_provenance(classifier.provenance)}, adapted to {photos} photos."
    if estimate is not None and estimate.photos:
        low, high = estimate.interval
        facts |= {"held_out_accuracy": round(estimate.accuracy, 4)}
        facts |= {"held_out_photos": estimate.photos}
        text += (
            f" Of {estimate.photos} photos that were held out {estimate.accuracy:.1%} were right "
            f"(95 % interval {low:.1%} to {high:.1%})."
        )
    outputs = {"class": "string", "confidence": "double", "looks_like_none": "boolean"}
    outputs |= {"p_known": "double"} | {f"p({each})": "double" for each in names}
    card = _Card(
        kind="classifier",
        loader="pipeline.serving",
        learner=classifier.learner,
        example={"image": [as_text(classifier.support[0])]},
        outputs=outputs,
        tags=_facts(classifier.provenance) | facts,
        text=text,
    )
    return _log(run, card, file, name, alias)


def log_learner(
    run: Run, given: "Given", file: Path, name: str | None, alias: str | None = "champion"
) -> str | None:
    """The same of a learner that is adapted by each request; `pipeline.serving_learner` loads it.

    Args:
        run: open.
        given: what the file holds.
        file: written by `save_learner`.
        name: see `log_photo_classifier`.
        alias: see `log_photo_classifier`.

    Returns:
        See `log_photo_classifier`.
    """
    import torch

    photo = as_text(torch.zeros(given.photo_shape, dtype=torch.uint8))
    other = as_text(torch.full(given.photo_shape, 255, dtype=torch.uint8))
    card = _Card(
        kind="learner",
        loader="pipeline.serving_learner",
        learner=given.learner,
        example={"image": [photo, other, photo], "label": ["black", "white", ""]},
        outputs={"class": "string", "confidence": "double"},
        tags=_facts(given.provenance),
        text=f"{_provenance(given.provenance)}: adapts to the photos that have a label, and "
        "classifies those that have none.",
    )
    return _log(run, card, file, name, alias)


def as_text(photo: "Tensor") -> str:
    """A photo (C, H, W) uint8 as a request holds it: a JPEG file in base64."""
    from PIL import Image

    planes = photo.cpu().numpy()
    image = Image.fromarray(planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0))
    image.save(file := io.BytesIO(), "JPEG", quality=90)
    return b64encode(file.getvalue()).decode()


def _facts(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {key: provenance[key] for key in _FACTS if provenance.get(key)}


def _provenance(provenance: Mapping[str, Any]) -> str:
    return f"{provenance['learner']} {provenance['backbone']}".strip()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _log(run: Run, card: _Card, file: Path, name: str | None, alias: str | None) -> str | None:
    """Build the model's folder and hand it to the run."""
    tags = {key: str(value) for key, value in card.tags.items()} | {"source_run": run.run_id}
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / card.kind
            _save(folder, run.run_id, card, file)
            return run.log_model(folder, tags, card.text, name, alias)
    except Exception as error:  # a model that cannot be logged must not cost what was computed
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"tracking: the {card.kind} is not logged as a model ({reason})", file=sys.stderr)
        return None


def _save(folder: Path, run_id: str, card: _Card, file: Path) -> None:
    """Write MLflow's folder of a model.

    The signature has outputs alone: with an input schema MLflow makes a table of what it is given,
    and refuses images and lists of them before `predict` sees them.
    """
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own type hints, and its use of pandas 3
        from mlflow.models import Model, ModelSignature
        from mlflow.pyfunc import save_model
        from mlflow.types import ColSpec, Schema

        columns: list[Any] = [ColSpec(kind, column) for column, kind in card.outputs.items()]
        save_model(
            folder,
            loader_module=card.loader,
            data_path=str(file),
            code_paths=[str(_PACKAGE)],
            mlflow_model=Model(run_id=run_id),
            signature=ModelSignature(outputs=Schema(columns)),
            input_example=pd.DataFrame(card.example),
            pip_requirements=_requirements(card.learner),
        )


def _requirements(learner: "nn.Module") -> list[str]:
    """`name==version` of all that is needed, as it is installed here."""
    uses_timm = any(type(m).__module__.startswith("timm.") for m in learner.modules())
    names = [*_NEEDED, "timm"] if uses_timm else _NEEDED
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]


def upload(client: "MlflowClient", run_id: str, record: Mapping[str, Any]) -> str:
    """Send the folder of a model to the store and, if the record has a name, register it.

    Returns:
        Its URI.

    Raises:
        Exception: of the network if the store is away; else MLflow's for a wrong request, which
            the outbox does not keep.
    """
    from mlflow.exceptions import MlflowException

    try:
        made = _send(client, run_id, record)
        if record["name"] is None:
            return made.model_uri
        version = _register(client, run_id, record, made)
        return f"models:/{version.name}/{version.version}"
    except Exception as error:
        client.get_run(run_id)  # a store that answers this is not away
        raise MlflowException.invalid_parameter_value(str(error)) from error


def _send(client: "MlflowClient", run_id: str, record: Mapping[str, Any]) -> "LoggedModel":
    """The model as an output of the run."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    folder, tags = Path(record["path"]), record["tags"]
    experiment = client.get_run(run_id).info.experiment_id
    made = client.create_logged_model(experiment, folder.name, run_id, tags=tags)
    said = Model.load(str(folder))
    said.model_id = said.model_uuid = made.model_id
    said.artifact_path = made.artifact_location
    said.save(str(folder / "MLmodel"))
    client.log_model_artifacts(made.model_id, str(folder))
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, step=0)])
    return client.finalize_logged_model(made.model_id, "READY")


def _register(
    client: "MlflowClient", run_id: str, record: Mapping[str, Any], made: "LoggedModel"
) -> "ModelVersion":
    """A new version, with the alias moved to it."""
    from mlflow.exceptions import MlflowException

    name, alias = record["name"], record["alias"]
    with suppress(MlflowException):  # it exists; if that is not why, the next call says it
        client.create_registered_model(name)
    version = client.create_model_version(
        name,
        made.artifact_location,
        run_id,
        tags=record["tags"],
        description=record["description"],
        model_id=made.model_id,
    )
    if alias is not None:
        client.set_registered_model_alias(name, alias, version.version)
    return version


def refusal(line: str) -> Exception:
    """What `predict` raises in MLflow's server for bad input: answered with status 400."""
    from mlflow.exceptions import MlflowException

    class Refusal(MlflowException):
        """Keeps its line: the server would put the whole request before it."""

        def __setattr__(self, key: str, value: object) -> None:
            if key != "message" or "message" not in self.__dict__:
                super().__setattr__(key, value)

    return Refusal.invalid_parameter_value(line)
