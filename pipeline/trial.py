"""What the page to try a learner does with photos, and the HTML that it shows. Floor 4."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline import sources
from pipeline.classifier import MIN_FOR_TEMPERATURE, Estimate, PhotoClassifier
from pipeline.contact_sheet import percent, thumbnail
from pipeline.data.digits import Digits
from pipeline.data.photos import from_array
from pipeline.errors import UserError
from pipeline.html import render
from pipeline.learners.features import embeddings
from pipeline.trained import Given

NEAREST = 3  # support photos shown with an answer
_SIDE = 112  # px of a thumbnail
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Learned(NamedTuple):
    """What has been learned of somebody's classes.

    Attributes:
        classifier: adapted and calibrated.
        z: (m, d) embeddings of its support photos, of unit length; None if its learner has none.
        estimate: on support photos that were left out.
    """

    classifier: PhotoClassifier
    z: Tensor | None
    estimate: Estimate


class Near(NamedTuple):
    """A support photo beside an answer: its number, its class and its cosine similarity."""

    photo: int
    name: str
    similarity: float


class Answer(NamedTuple):
    """What is said of a photo.

    Attributes:
        rejected: whether it looks like none of the classes.
        shares: class names with their probabilities, the most probable first.
        nearest: of the support photos, the nearest first.
    """

    rejected: bool
    shares: list[tuple[str, float]]
    nearest: list[Near]


class Example(NamedTuple):
    """Photos to try the page with.

    Attributes:
        names: of the classes.
        photos: (k, C, S, S) of each of them.
        queries: (n, C, S, S), the last one of another class.
    """

    names: list[str]
    photos: list[np.ndarray]
    queries: np.ndarray


def about(given: Given) -> str:
    """One line, in Markdown, that says which learner it is and what its answers depend on."""
    of = given.provenance
    source = f"run `{of['run']}`" if of.get("run") else f"`{of.get('checkpoint')}`"
    if weights := of.get("weights"):
        source = "which knows ImageNet" if weights == "PACKAGED" else f"weights `{weights}`"
    named = f"**{of['learner']}**" + (f" on {of['backbone']}" if of["backbone"] else "")
    judged = "each photo is judged on its own"
    if of["protocol"] == "transductive":
        judged = (
            "photos dropped together are judged together, so one can change what is said of others"
        )
    ways = given.learner.n_way
    exactly = f" It takes exactly {ways} classes." if ways else ""
    return f"Learner: {named}, {source}. It is *{of['protocol']}*: {judged}.{exactly}"


def learn(
    given: Given,
    names: Sequence[str],
    photos: Sequence[Sequence[np.ndarray]],
    reject: float,
    done: Callable[[int], None] = lambda n: None,
) -> Learned:
    """Adapt to the classes that have a name or photos; empty rows of the page are passed over.

    Args:
        given: the learner.
        names: as typed, one a row.
        photos: (C, S, S) uint8 images of each row.
        reject: see `PhotoClassifier`.
        done: see `PhotoClassifier.calibrate`.

    Raises:
        UserError: unless there are two classes, each with a name of its own and a photo, and the
            learner takes so many.
    """
    rows = [
        (i, " ".join(n.split()), list(p))
        for i, (n, p) in enumerate(zip(names, photos, strict=True))
    ]
    rows = [row for row in rows if row[1] or row[2]]
    found: list[str] = []
    for i, name, images in rows:
        if not name:
            raise UserError(f"Class {i + 1} has photos but no name: type one.")
        if not images:
            raise UserError(f"{name!r} has no photos yet: drop a few, or clear its name.")
        if name in found:
            raise UserError(f"Two classes are named {name!r}: give each a name of its own.")
        found.append(name)
    if len(rows) < 2:
        raise UserError("Two classes are needed at least, each with a name and photos.")
    support = torch.from_numpy(np.stack([image for _, _, each in rows for image in each]))
    labels = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(r[2]) for r in rows]))
    classifier = PhotoClassifier(given, support, labels, found, reject)
    estimate = classifier.calibrate(done)
    z = embeddings(classifier.learner, classifier.prepare(support))
    return Learned(classifier, None if z is None else normalize(z), estimate)


def answer(learned: Learned, queries: Sequence[np.ndarray]) -> list[Answer]:
    """Classify photos (C, S, S) and find the support photos that are nearest to each.

    Nearest by the cosine of embeddings: what the network sees in common, which need not be what
    the class is decided by.
    """
    if not len(queries):
        return []
    classifier, z, _ = learned
    photos = torch.from_numpy(np.stack(list(queries)))
    said = classifier.predict(photos)
    near: list[list[Near]] = [[] for _ in queries]
    if z is not None:
        mine = embeddings(classifier.learner, classifier.prepare(photos))
        assert mine is not None
        top = (normalize(mine) @ z.T).topk(min(NEAREST, len(z)))
        for row, values, indices in zip(
            near, top.values.tolist(), top.indices.tolist(), strict=True
        ):
            for value, i in zip(values, indices, strict=True):
                row.append(Near(i, classifier.class_names[int(classifier.support_y[i])], value))
    answers = []
    for p, rejected, nearest in zip(said.probabilities, said.rejected, near, strict=True):
        shares = [(classifier.class_names[i], float(p[i])) for i in np.argsort(-p, kind="stable")]
        answers.append(Answer(bool(rejected), shares, nearest))
    return answers


def photos_html(images: Sequence[np.ndarray]) -> str:
    """Thumbnails of the photos of a class; nothing if there are none."""
    return _render("photos", pictures=_thumbnails(images)) if len(images) else ""


def estimate_html(learned: Learned) -> str:
    """The accuracy to expect, the photos that were taken for another class, and what to know."""
    classifier, _, estimate = learned
    names, classes = classifier.class_names, classifier.support_y.tolist()
    wrong = estimate.indices[~estimate.correct]
    pictures = _thumbnails(classifier.support[wrong].numpy())
    taken_for = [names[c] for c in estimate.predicted[~estimate.correct]]
    return _render(
        "estimate",
        estimate=estimate,
        classes=len(names),
        given=len(classes),
        mistakes=list(zip(pictures, [names[classes[i]] for i in wrong], taken_for, strict=True)),
        can_reject=classifier.can_reject,
        needed=classifier.needed_to_reject,
        calibrated=estimate.photos >= MIN_FOR_TEMPERATURE,
    )


def problem_html(error: UserError) -> str:
    """What there is to do before anything can be learned."""
    return _render("problem", text=str(error))


def answers_html(learned: Learned | None, queries: Sequence[np.ndarray]) -> str:
    """A card for each photo; nothing if there are none."""
    if not len(queries):
        return ""
    answers = answer(learned, queries) if learned else []
    shown = sorted({near.photo for each in answers for near in each.nearest})
    support = learned.classifier.support[shown].numpy() if learned and shown else ()
    near = dict(zip(shown, _thumbnails(support), strict=True))
    return _render("answers", pictures=_thumbnails(queries), answers=answers, support=near)


def example(given: Given, classes: int, shots: int = 6) -> Example:
    """Handwritten digits, real scans that are at hand without a download.

    Args:
        given: the learner that they are for.
        classes: at most; there are nine and one to be unknown.
        shots: photos a class.
    """
    channels, side, _ = sources.image_shape(given.cfg.data)
    pool = Digits().load().pool
    n = min(classes, len(_DIGITS) - 1)
    random = np.random.default_rng(0)
    of = [random.permutation(np.flatnonzero(pool.labels == c))[: shots + 1] for c in range(n + 1)]

    def images(indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.stack([from_array(pool.images[i, 0], channels, side) for i in indices])

    queries = images([of[c][shots] for c in range(n + 1)])
    return Example(list(_DIGITS[:n]), [images(of[c][:shots]) for c in range(n)], queries)


def _render(part: str, **values: object) -> str:
    return render("trial.html", {"percent": percent}, part=part, **values)


def _thumbnails(images: Sequence[np.ndarray] | np.ndarray) -> list[str]:
    return [thumbnail(image, _SIDE) for image in images]
