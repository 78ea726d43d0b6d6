"""Pictures of a classifier that was made from photos. Floor 4."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pipeline.calibration import reliability
from pipeline.classifier import BATCH, PhotoClassifier, Predictions
from pipeline.figures import inner_loop_figure
from pipeline.functional import principal_components
from pipeline.inside_figures import (
    Embedded,
    Point,
    embedding_figure,
    reliability_figure,
    shape_figure,
)
from pipeline.learners.embedding import EmbeddingLearner
from pipeline.learners.evaluation import adapting_in, shown_steps
from pipeline.learners.features import embeddings
from pipeline.learners.gradient import GradientLearner, InnerCurve
from pipeline.learners.held_out import accuracies_by_shots, held_out_logits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWS, FEW_DRAWS = 20, 5  # of photos, for a point of a curve
MAPPED = 200  # queries at most on the map: more hide each other, and each is embedded again
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
    """Name and figure: embeddings, shots, of gradient learners inner steps, reliability.

    Args:
        classifier: calibrated.
        support_y: (m,) classes of its photos.
        query: further photos; None if there are none with labels.
        title: of each.
    """
    if shown := _map(classifier, support_y, query):
        yield "embeddings", embedding_figure(shown, title)
    if shots := _shots(classifier, title):
        yield "shots", shots
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
        shown = np.linspace(0, len(query.labels) - 1, min(MAPPED, len(query.labels))).astype(int)
        photos = torch.cat([photos, torch.from_numpy(query.images[shown]).to(photos.device)])
        labels = np.concatenate([labels, query.labels[shown]])
        predicted = query.said.labels[shown]
    parts = [embeddings(classifier.learner, classifier.prepare(p)) for p in photos.split(BATCH)]
    z = [part for part in parts if part is not None]
    if not z:
        return None
    points, shares = principal_components(torch.cat(z), 2)
    at, share = points.cpu().numpy(), shares.cpu().numpy()
    return Embedded(classifier.class_names, at, share, labels, predicted)


@torch.inference_mode()
def _shots(classifier: PhotoClassifier, title: str) -> "Figure | None":
    """Whether more photos would help; None if they are too few for two points."""
    x, y = classifier.prepare(classifier.support), classifier.support_y
    n_way, learner = len(classifier.class_names), classifier.learner
    draws = DRAWS if isinstance(learner, EmbeddingLearner) and learner.embeds_once else FEW_DRAWS
    found = accuracies_by_shots(learner, x, y, draws)
    if len(found) < 2:
        return None
    points = [Point(n_way, k, float(a.mean()), 1.96 * float(a.std())) for k, a in found.items()]
    title = f"{title}\n{draws} draws of its photos a point, the others asked; band: 95 % of draws"
    return shape_figure(points, n_way, [], title)


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
