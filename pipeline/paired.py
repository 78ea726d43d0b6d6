"""Comparison of learners that were tested on the same episodes. Floor 0: numpy and scipy only."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Difference(NamedTuple):
    """How much more accurate one learner is than another, in the unit of the accuracies.

    Attributes:
        mean: of a - b over the episodes.
        low, high: its 95 % interval.
        p: of the Wilcoxon signed-rank test, two-sided.
    """

    mean: float
    low: float
    high: float
    p: float


def compare(a: np.ndarray, b: np.ndarray) -> Difference:
    """Compare accuracies (n,) and (n,) of the same n episodes in the same order.

    The interval is Student's t of the n differences. Accuracies of few queries are discrete, so
    many differences are zero and many tie: zeros keep their ranks but have no sign (Pratt 1959),
    as leaving them out beforehand would make differences of one query look large; the
    p-value is that of the normal approximation with its variance corrected for both.

    Raises:
        ValueError: if the two are not of one length, or of fewer than two episodes.
    """
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"paired accuracies: found shapes {a.shape} and {b.shape}")
    difference = np.round(a - b, 9)  # 0.6 - 0.4 and 0.4 - 0.2 are one tie
    mean = float(difference.mean())
    error = float(stats.sem(difference))
    half = float(stats.t.ppf(0.975, len(a) - 1)) * error
    p = 1.0
    if difference.any():
        p = float(stats.wilcoxon(difference, zero_method="pratt", method="asymptotic").pvalue)
    return Difference(mean, mean - half, mean + half, p)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """P-values corrected for their number: Holm 1979, step-down.

    Rejecting what is below alpha keeps the chance of any false rejection below alpha, whatever
    the dependence between the tests.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    steps = (len(p) - np.arange(len(p))) * p[order]
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected


def mean_t95(values: np.ndarray) -> tuple[float, float]:
    """Mean of values (n,) and the half width of its 95 % interval by Student's t; nan for one."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean()), float(half)
