"""Whether confidences can be believed: temperature, reliability, ranks. Floor 0.

Confidence is the probability that softmax gives to the predicted class. Everything here takes
numpy arrays, or tensors on any device, and returns numpy arrays or numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

Values = ArrayLike | Tensor
HALVINGS = 50  # of the interval of log temperatures, 11.5 wide: to rounding error


class Reliability(NamedTuple):
    """Predictions gathered by their confidence; nan where a bin is empty.

    Attributes:
        confidences: (bins,) mean confidence in the bin.
        accuracies: (bins,) share of right predictions in it.
        counts: (bins,) predictions in it.
    """

    confidences: np.ndarray
    accuracies: np.ndarray
    counts: np.ndarray

    def ece(self) -> float:
        """Expected calibration error (Guo et al. 2017, eq. 3), in 0..1."""
        gaps = self.counts * np.abs(self.accuracies - self.confidences)
        return float(np.nansum(gaps) / self.counts.sum())


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """The T > 0 for which softmax(logits / T) has the least negative log-likelihood of y.

    Guo, Pleiss, Sun, Weinberger 2017, sec. 4.2, https://arxiv.org/abs/1706.04599. The loss is
    convex in 1/T, so its slope is halved into from both sides of log T. With s the root mean square
    of the logits' distances from their row means, T stays

    - at or below 100 s, where all classes are equally likely: for logits worse than chance;
    - at or above s / 1000, and so high that the mean confidence of the n predictions is at most
      (n + 1) / (n + 2), which is Laplace's rule of succession for n right answers out of n. Where
      every prediction is right the likelihood alone would have T go to 0; a few dozen
      images are no proof of certainty.

    T scales with the logits; if they tell no classes apart it is 1.

    Args:
        logits: (n, classes), finite.
        y: (n,) true classes.

    Raises:
        ValueError: for shapes that do not fit, no rows, or logits that are not finite.
    """
    if logits.ndim != 2 or y.shape != logits.shape[:1] or not len(y):
        raise ValueError(f"temperature: found shapes {tuple(logits.shape)} and {tuple(y.shape)}")
    z = logits.detach().double()
    if not z.isfinite().all():
        raise ValueError("temperature: found logits that are not finite")
    z = z - z.mean(1, keepdim=True)
    scale = float(z.square().mean().sqrt())
    if not scale:
        return 1.0
    z = z / scale
    truth = z.gather(1, y.long().unsqueeze(1)).squeeze(1)  # (n,)
    most = (len(y) + 1) / (len(y) + 2)

    def too_sharp(log_t: float) -> bool:
        p = torch.softmax(z / np.exp(log_t), dim=1)
        slope = ((p * z).sum(1) - truth).mean()  # of the loss in 1/T
        return bool(slope > 0) or float(p.amax(1).mean()) > most

    return scale * float(np.exp(_first_false(too_sharp, np.log(1e-3), np.log(1e2))))


def _first_false(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Where a condition that holds below some number and not above it ceases to, by halving."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def reliability(probabilities: Values, y: Values, bins: int = 15) -> Reliability:
    """Accuracy by confidence, in bins of equal width (Guo et al. 2017, sec. 2).

    Bin m = 1, 2, ... holds the confidences in ((m - 1) / bins, m / bins].

    Args:
        probabilities: (n, classes), rows sum to 1.
        y: (n,) true classes.
    """
    p, truth = _array(probabilities), _array(y)
    confidence, right = p.max(1), p.argmax(1) == truth
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    place = np.digitize(confidence, edges, right=True)
    count = np.bincount(place, minlength=bins)
    total = np.maximum(count, 1)
    sums = [np.bincount(place, weights=w, minlength=bins) for w in (confidence, right)]
    mean, accuracy = (np.where(count, each / total, np.nan) for each in sums)
    return Reliability(mean, accuracy, count)


def ece(probabilities: Values, y: Values, bins: int = 15) -> float:
    """Expected calibration error in 0..1; see `reliability`."""
    return reliability(probabilities, y, bins).ece()


def wilson_interval(correct: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a share that was found to be correct / n.

    Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953. Never outside of 0..1, and not
    empty when all or none are right; with n = 0 it is 0 to 1.

    Raises:
        ValueError: unless 0 <= correct <= n.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"wilson_interval: found {correct} correct of {n}")
    if not n:
        return 0.0, 1.0
    share, extra = correct / n, z * z / n
    centre = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * float(np.sqrt(share * (1 - share) / n + extra / (4 * n)))
    return max(0.0, centre - half), min(1.0, centre + half)


def auroc(positive_scores: Values, negative_scores: Values) -> float:
    """The chance that a positive scores above a negative, ties counting half.

    Area under the ROC curve as Mann and Whitney's U (Hanley, McNeil 1982,
    https://doi.org/10.1148/radiology.143.1.7063747).

    Raises:
        ValueError: if there is none of either.
    """
    positive, negative = _array(positive_scores).ravel(), np.sort(_array(negative_scores).ravel())
    if not len(positive) or not len(negative):
        raise ValueError(f"auroc: found {len(positive)} positives and {len(negative)} negatives")
    below, not_above = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
    return float((below + not_above).mean() / (2 * len(negative)))


def conformal_p(scores: Values, known_scores: Values) -> np.ndarray:
    """How unusually low each score is among those of known cases, as p-values in (0, 1].

    (1 + number of known scores that are not above it) / (known + 1): Vovk, Gammerman, Shafer 2005,
    https://doi.org/10.1007/b106715. For a new case that is exchangeable with the known ones it is
    at or below any alpha with probability at most alpha.

    Args:
        scores: (...) higher looks more like the known ones.
        known_scores: (k,) of cases held out when the scoring was made.

    Returns:
        Of the shape of `scores`; all ones if nothing is known.
    """
    known = np.sort(_array(known_scores).ravel())
    not_above = np.searchsorted(known, _array(scores), side="right")
    return np.asarray((1 + not_above) / (len(known) + 1))


def coverage_accuracy(confidence: Values, correct: Values) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of what is kept if only the most confident predictions are.

    The risk-coverage curve of Geifman, El-Yaniv 2017, https://arxiv.org/abs/1705.08500, with
    accuracy in place of risk. Predictions of one confidence are kept or left together.

    Args:
        confidence: (n,).
        correct: (n,) bool.

    Returns:
        Coverage, rising to 1, and accuracy, both (m,), m the number of distinct confidences.
    """
    value, right = _array(confidence), _array(correct)
    order = np.argsort(-value, kind="stable")
    last = np.append(np.diff(value[order]) != 0, True)[: len(value)]  # of its confidence
    kept = np.arange(1, len(value) + 1)[last]
    return kept / max(1, len(value)), np.cumsum(right[order])[last] / kept


def _array(values: Values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
