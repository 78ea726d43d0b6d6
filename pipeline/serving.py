"""What a model in MLflow's registry runs: photos in, a table out. Floor 4.

MLflow calls `_load_pyfunc` and then `predict`. The model's data is one file of tensors and plain
containers, so that no pickle is read. `mlflow models serve` listens on 127.0.0.1 unless told
otherwise.
"""

import os
import sys
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.classifier import PhotoClassifier, Predictions
from pipeline.data.files import MAX_BYTES
from pipeline.data.photos import decode_bytes, from_array, from_pil
from pipeline.errors import UserError

MAX_SERVED = 256  # images in a request
COLUMN = "image"
_SIGNS = ("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "__pyfunc_model_path__")
"""Variables that MLflow's scoring server sets for itself."""
_WANTED = "a path, the bytes of a file, base64 text, a PIL image or a uint8 array"


def _load_pyfunc(path: str) -> "ServedClassifier":
    """The entry that MLflow looks for: the classifier in the file that the model was made of."""
    return ServedClassifier(PhotoClassifier.load(Path(path)))


class ServedClassifier:
    """A `PhotoClassifier` as MLflow calls it."""

    def __init__(self, classifier: PhotoClassifier) -> None:
        ready()
        classifier.adapted()
        self.classifier = classifier

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Classify photos.

        Args:
            model_input: one image, a list of them, or a table with the column image. An image is
                a path, the bytes of a file, base64 text (also as a data URL), a PIL image, or a
                uint8 array (H, W), (H, W, 3) or (H, W, 4). In a server text is base64 alone.
            params: none are known.

        Returns:
            See `as_table`; a row an image, in order.

        Raises:
            UserError: naming the first image that cannot be read, by its place from 0; in a
                server MLflow's exception, which it answers with status 400.
        """
        with refusing():
            channels, size, _ = self.classifier.image_shape
            photos = decode(images_of(model_input), channels, size)
            return as_table(self.classifier.predict(photos), self.classifier.class_names)


def ready() -> None:
    """Register the formats: requests come in threads, which would race in it."""
    Image.init()


def as_table(predictions: Predictions, class_names: Sequence[str]) -> pd.DataFrame:
    """Columns class, confidence, looks_like_none (rejected), p_known and p(NAME) of each class."""
    return pd.DataFrame(
        {
            "class": [class_names[label] for label in predictions.labels],
            "confidence": predictions.confidences.astype(float),
            "looks_like_none": predictions.rejected,
            "p_known": predictions.known,
        }
        | probabilities(predictions, class_names)
    )


def probabilities(predictions: Predictions, class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """The probability of each class, under names that no other column can have."""
    columns = predictions.probabilities.T  # (classes, n)
    return {f"p({name})": p.astype(float) for name, p in zip(class_names, columns, strict=True)}


def images_of(model_input: Any) -> list[Any]:
    """The images of an input, not looked at yet; see `ServedClassifier.predict`.

    Raises:
        UserError: if a table has no column for them, or a request holds too many.
    """
    found = _listed(model_input)
    if len(found) > MAX_SERVED and in_server():
        raise UserError(f"{len(found)} images, more than the {MAX_SERVED} of a request")
    return found


def _listed(given: Any) -> list[Any]:
    match given:
        case pd.DataFrame() | Mapping():
            if COLUMN not in given:
                there = ", ".join(map(repr, given)) or "none"
                raise UserError(f"columns: found {there}; expected {COLUMN!r}")
            return _listed(given[COLUMN])
        case pd.Series():
            return given.tolist()
        case np.ndarray() if given.dtype.kind in "OU" or given.ndim == 4:
            return list(given) if given.ndim else [given.item()]
        case list() | tuple() if given and all(isinstance(each, Mapping) for each in given):
            return [image for each in given for image in _listed(each)]
        case list() | tuple():
            return list(given)
        case _:
            return [given]


def decode(images: Sequence[Any], channels: int, size: int) -> np.ndarray:
    """Images as `ServedClassifier.predict` takes them -> (n, C, S, S) uint8.

    Raises:
        UserError: naming the first that cannot be read.
    """
    photos = np.empty((len(images), channels, size, size), dtype=np.uint8)
    for i, image in enumerate(images):
        try:
            photos[i] = _decoded(image, channels, size)
        except UserError as error:
            raise UserError(f"{COLUMN}[{i}]: {error}") from error
    return photos


def _decoded(image: Any, channels: int, size: int) -> np.ndarray:
    match image:
        case Image.Image():
            return from_pil(image, channels, size)
        case np.ndarray():
            return from_array(image, channels, size)
        case Path():
            data = _read(image)
        case str():
            data = _from_text(image)
        case bytes() | bytearray() | memoryview():
            data = bytes(image)
        case _:
            wanted = "base64 text" if in_server() else _WANTED
            raise UserError(f"found {type(image).__name__}; expected {wanted}")
    return decode_bytes(data, channels, size)


def _from_text(text: str) -> bytes:
    """The file that a text is or, outside of a server, names."""
    coded = text
    if text.startswith("data:"):
        head, _, coded = text.partition(",")
        if not head.endswith(";base64"):
            raise UserError("a data URL, but not of base64: expected data:image/...;base64,...")
    elif not in_server() and os.path.isfile(text):
        return _read(Path(text))
    if len(coded) > MAX_BYTES * 3 // 2:  # a third more than the bytes, and line breaks
        raise UserError(f"more than the {MAX_BYTES >> 20} MiB that are read of an image")
    try:
        return b64decode("".join(coded.split()), validate=True)
    except ValueError as error:
        seen = str(text) if len(text) <= 60 else f"{text[:57]}..."
        what = "text is no base64" if in_server() else "neither a file nor base64"
        raise UserError(f"{what}: found {seen!r}") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)  # one too many is refused when it is decoded
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def in_server() -> bool:
    """Whether this process answers requests of others, whose texts must not name files."""
    served = "mlflow.pyfunc.scoring_server.app" in sys.modules
    return served or any(os.environ.get(sign) for sign in _SIGNS)


@contextmanager
def refusing() -> Iterator[None]:
    """Bad input in a server: as the exception that MLflow answers with status 400 and one line."""
    try:
        yield
    except UserError as error:
        if not in_server():
            raise
        from pipeline.tracking.models import refusal

        raise refusal(str(error)) from None
