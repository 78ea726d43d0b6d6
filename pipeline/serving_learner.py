"""What a registered meta-learner runs: labelled photos and others in, a table out. Floor 4."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pipeline.classifier import PhotoClassifier
from pipeline.errors import UserError
from pipeline.serving import COLUMN, decode, images_of, probabilities, ready, refusing
from pipeline.trained import Given, load_learner

LABEL = "label"


def _load_pyfunc(path: str) -> "ServedLearner":
    """The entry that MLflow looks for: the learner in the file that the model was made of."""
    return ServedLearner(load_learner(Path(path)))


class ServedLearner:
    """A learner as MLflow calls it: each call adapts it anew and leaves nothing behind."""

    def __init__(self, given: Given) -> None:
        ready()
        self.given = given

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Adapt to the rows with a label, and classify those without.

        Args:
            model_input: a table, or what makes one, with the columns image (see
                `ServedClassifier.predict`) and label: a class name, or nothing for a photo that is
                to be classified.
            params: none are known.

        Returns:
            A row for each photo without a label, in order: class, confidence and p(NAME) of each
            class, in the order of their names. Confidences are the learner's own, not calibrated.

        Raises:
            UserError: see `ServedClassifier.predict`; or if fewer than two classes are labelled, or
                the learner takes another number of them.
        """
        with refusing():
            images, labels = _rows(model_input)
            names = tuple(sorted({label for label in labels if label}))
            if len(names) < 2:
                raise UserError(f"{LABEL}: found {', '.join(names) or 'none'}; two are needed")
            channels, size, _ = self.given.photo_shape
            photos = torch.from_numpy(decode(images, channels, size))
            given = torch.tensor([bool(label) for label in labels])
            y = torch.tensor([names.index(label) for label in labels if label])
            classifier = PhotoClassifier(self.given, photos[given], y, names)
            said = classifier.predict(photos[~given])
            answer = pd.DataFrame(probabilities(said, names))
            answer.insert(0, "class", [names[i] for i in said.labels])
            answer.insert(1, "confidence", said.confidences.astype(float))
            return answer


def _rows(given: Any) -> tuple[list[Any], list[str]]:
    """The images of a table, and their labels, empty where there is none."""
    try:
        columns = {k: list(v) for k, v in given.items()} if isinstance(given, Mapping) else given
        table = pd.DataFrame(columns)
    except (ValueError, TypeError) as error:
        raise UserError(f"columns: expected {COLUMN} and {LABEL} ({error})") from error
    if LABEL not in table:
        there = ", ".join(map(repr, table)) or "none"
        raise UserError(f"columns: found {there}; expected {COLUMN!r} and {LABEL!r}")
    return images_of(table), [_name(label) for label in table[LABEL]]


def _name(label: Any) -> str:
    """A cell as the name of a class; empty for none."""
    if not pd.api.types.is_scalar(label):
        raise UserError(f"{LABEL}: found {type(label).__name__}; expected a name, or nothing")
    if pd.isna(label):
        return ""
    if isinstance(label, float) and label.is_integer():  # whole numbers beside an empty cell
        label = int(label)
    return str(label).strip()
