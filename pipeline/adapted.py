"""What `adapt` leaves behind: files, tables, pictures, numbers. Floor 4."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from pipeline.calibration import reliability, wilson_interval
from pipeline.classifier import Estimate, PhotoClassifier, Predictions
from pipeline.contact_sheet import Shown, contact_sheet, percent
from pipeline.data.photos import Photos
from pipeline.functional import principal_components
from pipeline.inside_figures import Embedded, embedding_figure, held_out_figure
from pipeline.learners.evaluation import adapting_in, shown_steps
from pipeline.learners.features import embeddings
from pipeline.learners.gradient import GradientLearner

if TYPE_CHECKING:
    from pipeline.tracking.run import Run

LINES = 12  # predictions that are printed; predictions.csv has all


class Adapted:
    """A classifier, the photos it was made from, and what it says of others.

    Args:
        classifier: calibrated.
        support: its photos.
        estimate: of its accuracy.
        query, said: photos and what it says of them; None if there are none.
    """

    def __init__(
        self,
        classifier: PhotoClassifier,
        support: Photos,
        estimate: Estimate,
        query: Photos | None,
        said: Predictions | None,
    ) -> None:
        self.classifier, self.support, self.estimate = classifier, support, estimate
        self.query, self.said = query, said
        self.names = classifier.class_names

    def numbers(self) -> dict[str, float]:
        """What is known of the accuracy, in 0..1."""
        found = {"accuracy": self.estimate.accuracy}
        if self.query is not None and self.said is not None and self.query.labels is not None:
            found["query_accuracy"] = float((self.said.labels == self.query.labels).mean())
        return found
