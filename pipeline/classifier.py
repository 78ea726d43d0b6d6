"""PhotoClassifier: a learner adapted to somebody's photos, to be kept, sent and served. Floor 4."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import sources
from pipeline.calibration import conformal_p, fit_temperature, wilson_interval
from pipeline.checkpoints import read_file, whole
from pipeline.data.transforms import to_float
from pipeline.episode import Classifier
from pipeline.errors import UserError
from pipeline.learners.held_out import held_out_logits, number_of_folds
from pipeline.trained import Given, as_plain, from_plain

KEY = "photo_classifier"
BATCH = 64  # photos classified at a time
MIN_FOR_TEMPERATURE = 8  # held-out photos; below, the learner's own scale stays


class Estimate(NamedTuple):
    """Accuracy on support photos that were left out, each classified without itself.

    Attributes:
        accuracy: in 0..1; nan if no photo could be left out.
        interval: 95 %, in 0..1; see `calibration`.
        photos: how many were left out, of classes with two photos or more.
        correct: (photos,) which were right.
        indices: (photos,) which of the support photos they are.
        predicted: (photos,) what they were taken for.
    """

    accuracy: float
    interval: tuple[float, float]
    photos: int
    correct: np.ndarray
    indices: np.ndarray
    predicted: np.ndarray


class Calibration(NamedTuple):
    """What photos that were left out teach.

    Attributes:
        estimate: of the accuracy.
        temperature: that logits are to be divided by.
        known_scores: (h,) `scores` of them after that, sorted.
    """

    estimate: Estimate
    temperature: float
    known_scores: Tensor


class Predictions(NamedTuple):
    """What the classifier says of photos.

    Attributes:
        probabilities: (n, classes), rows sum to 1.
        known: (n,) p-values in 0..1 of being one of the classes at all; low: it looks like none.
        rejected: (n,) bool, whether `known` is at or below the share that may be rejected wrongly.
    """

    probabilities: np.ndarray
    known: np.ndarray
    rejected: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """(n,) most probable class."""
        return self.probabilities.argmax(1)

    @property
    def confidences(self) -> np.ndarray:
        """(n,) probability of that class."""
        return self.probabilities.max(1)


class PhotoClassifier(nn.Module):
    """From uint8 photos to logits, by `learner.adapt` on the support photos.

    Args:
        given: the learner, what it is built from and where it comes from.
        support: (m, C, H, W) uint8 photos.
        support_y: (m,) classes.
        class_names: of the classes.
        reject: see below.

    Attributes:
        temperature: logits are divided by it; fitted to held-out photos by `calibrate`.
        known_scores: (h,) scores of held-out photos, sorted; see `scores`.
        reject: share of photos of the classes that may be taken for unknown, in 0..1.
    """

    support: Tensor
    support_y: Tensor
    known_scores: Tensor

    def __init__(
        self,
        given: Given,
        support: Tensor,
        support_y: Tensor,
        class_names: Sequence[str],
        reject: float = 0.05,
    ) -> None:
        super().__init__()
        try:
            given.learner.check_ways(len(class_names))
        except ValueError as error:
            raise UserError(str(error)) from error
        self.learner, self.cfg, self.provenance = given
        self.class_names = tuple(class_names)
        self.register_buffer("support", support)
        self.register_buffer("support_y", support_y)
        self.register_buffer("known_scores", torch.zeros(0))
        self.temperature, self.reject = 1.0, reject
        self._adapted: Classifier | None = None
        self.requires_grad_(False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the photos that it takes."""
        c, h, w = self.support.shape[1:]
        return c, h, w

    def prepare(self, photos: Tensor) -> Tensor:
        """uint8 (n, C, H, W) -> what the learner takes."""
        data = self.cfg.data
        return to_float(photos, sources.image_shape(data), list(data.mean), list(data.std))

    def adapted(self) -> Classifier:
        """The learner adapted to all support photos; done once."""
        if self._adapted is None:
            with torch.inference_mode(False), torch.no_grad():
                self._adapted = self.learner.adapt(self.prepare(self.support), self.support_y)
        return self._adapted

    def forward(self, photos: Tensor) -> Tensor:
        """uint8 (n, C, H, W) -> logits (n, classes), divided by the temperature."""
        return self.adapted()(self.prepare(photos)) / self.temperature

    def calibrate(self, done: Callable[[int], None] = lambda n: None) -> Estimate:
        """Classify support photos that were left out; fit temperature and rejection to that.

        Returns:
            The accuracy to expect; a little low, as each adaptation lacks a photo.

        Raises:
            UserError: if the learner's logits are not finite.
        """
        logits, held = held_out_logits(
            self.learner, self.prepare(self.support), self.support_y, done
        )
        if not logits.isfinite().all():
            raise UserError(
                f"{self.learner.label}: its logits of the support photos are not finite, so its "
                "training ran away; train it with a lower learner.optimizer.lr"
            )
        found = calibration(logits, held, self.support_y)
        self.temperature, self.known_scores = found.temperature, found.known_scores
        return found.estimate

    @property
    def needed_to_reject(self) -> int | None:
        """How many photos have to be held out for any score to be low enough; None: never is."""
        return math.ceil(1 / self.reject - 1) if self.reject else None

    @property
    def can_reject(self) -> bool:
        """Whether so many were."""
        needed = self.needed_to_reject
        return needed is not None and len(self.known_scores) >= needed

    @torch.inference_mode()
    def predict(
        self, photos: np.ndarray | Tensor, done: Callable[[int], None] = lambda n: None
    ) -> Predictions:
        """Classify uint8 photos (n, C, H, W).

        A transductive learner looks at `BATCH` of them at a time, drawn from all: folders come
        class by class, and it would take the few classes of a part for all there are.

        Args:
            photos: see `image_shape`.
            done: told after each batch how many have been classified.
        """
        given, logits = torch.as_tensor(photos), [torch.zeros(0, len(self.class_names))]
        order, count = torch.arange(len(given)), 0
        if self.learner.protocol != "inductive":
            order = torch.randperm(len(given), generator=torch.Generator().manual_seed(0))
        for part in order.tensor_split(-(-len(order) // BATCH)) if len(order) else ():
            logits.append(self(given[part].to(self.support.device)).float().cpu())
            done(count := count + len(part))
        together = torch.cat(logits)[order.argsort()]
        known = conformal_p(scores(together), self.known_scores)
        rejected = known <= self.reject if self.can_reject else np.zeros(len(known), dtype=bool)
        return Predictions(together.softmax(1).numpy(), known, rejected)

    def save(self, path: Path) -> None:
        """Write one file of tensors and plain containers; `load` reads it."""
        plain = as_plain(Given(self.learner, self.cfg, self.provenance)) | {
            "class_names": list(self.class_names),
            "temperature": self.temperature,
            "reject": self.reject,
        }
        torch.save({KEY: plain, "state_dict": self.state_dict()}, path)

    @classmethod
    def load(cls, path: Path) -> "PhotoClassifier":
        """Read what `save` wrote. Nothing in the file is executed.

        Raises:
            UserError: if it is no such file.
        """
        file = read_file(path, KEY, "classifier")
        with whole(path, "classifier"):
            plain, state = file[KEY], file["state_dict"]
            photos = state["support"], state["support_y"]
            given = from_plain(plain, path)
            classifier = cls(given, *photos, plain["class_names"], plain["reject"])
            classifier.known_scores = torch.zeros_like(state["known_scores"])
            classifier.load_state_dict(state)
            classifier.temperature = plain["temperature"]
        return classifier


def calibration(logits: Tensor, held: Tensor, support_y: Tensor) -> Calibration:
    """Accuracy, temperature and scores of photos that were left out.

    The interval is Wilson's for fewer photos than were left out, n (k - 1) / (2 k - 1) of k folds:
    each photo is support too in all folds but one, so they do not err apart from each other
    (Nadeau, Bengio 2003, https://doi.org/10.1023/A:1024068626366, section 3).

    Args:
        logits, held: see `held_out_logits`.
        support_y: (m,) classes of all support photos.
    """
    y = support_y[held]
    temperature = fit_temperature(logits, y) if len(held) >= MIN_FOR_TEMPERATURE else 1.0
    predicted = logits.argmax(1)
    correct = (predicted == y).cpu().numpy()
    right, n = int(correct.sum()), len(held)
    k = number_of_folds(support_y.cpu().numpy())
    apart = (k - 1) / (2 * k - 1)
    interval = wilson_interval(apart * right, apart * n)
    arrays = (correct, held.cpu().numpy(), predicted.cpu().numpy())
    estimate = Estimate(right / n if n else float("nan"), interval, n, *arrays)
    return Calibration(estimate, temperature, scores(logits / temperature).sort().values.clone())


def scores(logits: Tensor) -> Tensor:
    """How much each row (n, classes) looks like one of the classes at all: its largest logit.

    Hendrycks et al. 2022, https://arxiv.org/abs/1911.11132. Of a prototype learner: how near the
    nearest class is.
    """
    return logits.amax(1)
