"""Pictures of a classifier that was made from photos. Floor 4."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pipeline.calibration import reliability
from pipeline.classifier import BATCH, PhotoClassifier, Predictions
from pipeline.figures import inner_loop_figure
from pipeline.functional import principal_components
from pipeline.inside_figures import Embedded, embedding_figure, reliability_figure
from pipeline.learners.evaluation import adapting_in, shown_steps
from pipeline.learners.features import embeddings
from pipeline.learners.gradient import GradientLearner, InnerCurve
from pipeline.learners.held_out import held_out_logits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANY = 100  # labelled photos from which on a reliability diagram is drawn


class Labelled(NamedTuple):
    """Photos whose classes are known, and what the classifier says of them.

    Attributes:
        images: (q, C, H, W) uint8.
        labels: (q,) classes.
        said: of them.
    """

    images: np.ndarray
    labels: np.ndarray
    said: Predictions


def pictures(
    classifier: PhotoClassifier, support_y: np.ndarray, query: Labelled | None, title: str
) -> Iterator[tuple[str, "Figure"]]:
    """Name and figure: embeddings, of gradient learners inner steps, of many queries reliability.

    Args:
        classifier: calibrated.
        support_y: (m,) classes of its photos.
        query: further photos; None if there are none with labels.
        title: of each.
    """
    if shown := _map(classifier, support_y, query):
        yield "embeddings", embedding_figure(shown, title)
    if isinstance(classifier.learner, GradientLearner):
        yield "inner_steps", _inner_steps(classifier, classifier.learner, title)
    if query and len(query.labels) >= MANY:
        t = classifier.temperature
        raw = torch.from_numpy(np.log(np.maximum(query.said.probabilities, 1e-30)) * t)
        before, after = (
            reliability(p, query.labels) for p in (raw.softmax(1), query.said.probabilities)
        )
        about = f"{title}\n{len(query.labels)} photos; temperature from those left out"
        yield "reliability", reliability_figure(before, after, t, about)


@torch.inference_mode()
def _map(
    classifier: PhotoClassifier, support_y: np.ndarray, query: Labelled | None
) -> Embedded | None:
    """Support photos and queries in two dimensions; None of a learner without embeddings."""
    photos, labels, predicted = classifier.support, support_y, support_y[:0]
    if query:
        photos = torch.cat([photos, torch.from_numpy(query.images).to(photos.device)])
        labels, predicted = np.concatenate([labels, query.labels]), query.said.labels
    parts = [embeddings(classifier.learner, classifier.prepare(p)) for p in photos.split(BATCH)]
    z = [part for part in parts if part is not None]
    if not z:
        return None
    points, shares = principal_components(torch.cat(z), 2)
    at, share = points.cpu().numpy(), shares.cpu().numpy()
    return Embedded(classifier.class_names, at, share, labels, predicted)


@torch.inference_mode()
def _inner_steps(classifier: PhotoClassifier, learner: GradientLearner, title: str) -> "Figure":
    """Loss on the support photos, and accuracy on those left out, along the inner loop."""
    x, y = classifier.prepare(classifier.support), classifier.support_y
    steps, curve = shown_steps(learner), InnerCurve([], [])
    for k in steps:
        with adapting_in(learner, k):
            logits, held = held_out_logits(learner, x, y)
            curve.support_loss.append(float(learner.loss(learner.adapt(x, y)(x), y).mean()))
        curve.query_accuracy.append(float((logits.argmax(1) == y[held]).float().mean()))
    title = f"{title}\nqueries: photos left out"
    return inner_loop_figure({learner.label: curve}, steps, title)
