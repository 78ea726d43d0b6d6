"""Pictures that look inside a learner: embeddings, shots and ways, reliability. Floor 1."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.calibration import Reliability
from pipeline.figures import SUPPORT, WRONG, new_figure, short

PALE = "#a9bddb"
NAMED = 20  # classes that a legend has room for


class Embedded(NamedTuple):
    """Embeddings of one task in two dimensions; s support images, then q queries.

    Attributes:
        class_names: n_way names.
        points: (s+q, 2).
        shares: (2,) of the variance, in 0..1.
        labels: (s+q,) true class, 0..n_way-1.
        predicted: (q,) label that the classifier gave.
    """

    class_names: Sequence[str]
    points: np.ndarray
    shares: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray


class Point(NamedTuple):
    """Mean accuracy on tasks of one shape and the half width of its 95 % interval, in 0..1."""

    n_way: int
    k_shot: int
    accuracy: float
    ci95: float


def embedding_figure(task: Embedded, title: str) -> Figure:
    """A map of one task: support images are stars, queries dots, or crosses where wrong."""
    support = len(task.labels) - len(task.predicted)
    wrong = task.predicted != task.labels[support:]
    colours = _colours(len(task.class_names))
    named = len(colours) if len(colours) <= NAMED else 0
    figure = new_figure(7.2, max(4.4, 0.17 * named + 1.5))
    axis = figure.subplots()
    size = 170 if support <= 30 else 80
    given, asked = task.points[:support], task.points[support:]
    of_given, of_asked = colours[task.labels[:support]], colours[task.labels[support:]]
    for points, hues, marker, style in (
        (asked[~wrong], of_asked[~wrong], "o", {"s": 22, "alpha": 0.8, "linewidths": 0}),
        (given, of_given, "*", {"s": size, "edgecolors": "black", "linewidths": 0.8}),
        (asked[wrong], of_asked[wrong], "x", {"s": 34, "linewidths": 1.6}),
    ):
        axis.scatter(points[:, 0], points[:, 1], c=hues, marker=marker, **style)
    for side, share, number in zip("xy", task.shares, ("first", "second"), strict=True):
        label = f"{number} principal component, {100 * share:.0f} % of the variance"
        axis.set(**{f"{side}label": label, f"{side}ticks": []})
    axis.set_aspect("equal", adjustable="datalim")
    axis.margins(0.06)
    axis.spines[:].set_color("0.7")
    _key(axis, "*", "support image", markersize=10, markerfacecolor="white")
    _key(axis, "o", "query, right", markersize=5, color="0.3")
    _key(axis, "x", "query, taken for another class", markersize=6, color="0.3")
    for colour, name in list(zip(colours, task.class_names, strict=True))[:named]:
        _key(axis, "s", short(name, 30), markersize=6, color=colour)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    return figure


def _key(axis: Axes, marker: str, label: str, **style: Any) -> None:
    """An entry of the legend."""
    axis.plot([], [], marker, **{"color": "black", **style}, label=label)


def _colours(classes: int) -> np.ndarray:
    """(classes, 4), as different from each other as so many can be."""
    if classes <= 20:
        return mpl.colormaps["tab10" if classes <= 10 else "tab20"](range(classes))
    return mpl.colormaps["turbo"](np.linspace(0.02, 0.98, classes))


def shape_figure(points: Iterable[Point], n_way: int, k_shots: Sequence[int], title: str) -> Figure:
    """Accuracy against shots, and against ways if there is more than one number of them.

    Args:
        points: of n_way classes at several shots; of k_shots at several ways.
        n_way, k_shots: what stays the same along the lines.
    """
    points = sorted(points)
    panels = [k for k in k_shots if len({p.n_way for p in points if p.k_shot == k}) > 1]
    figure = new_figure(7.2 if panels else 4.6, 3.3)
    axes = figure.subplots(1, 1 + bool(panels), sharey=True, squeeze=False)[0]
    line = [p for p in points if p.n_way == n_way]
    _line(axes[0], [p.k_shot for p in line], line, f"{n_way}-way", SUPPORT)
    axes[0].axhline(100 / n_way, **CHANCE)
    _axis(axes[0], {p.k_shot for p in line}, "labelled images a class (shots)")
    axes[0].set_ylabel("accuracy on the queries, %")
    if panels:
        hues = mpl.colormaps["viridis"](np.linspace(0.1, 0.75, len(panels)))
        for k, hue in zip(panels, hues, strict=True):
            line = [p for p in points if p.k_shot == k]
            _line(axes[1], [p.n_way for p in line], line, f"{k}-shot", hue)
        ways = sorted({p.n_way for p in points})
        x = np.linspace(ways[0], ways[-1], 200)
        axes[1].plot(x, 100 / x, **CHANCE)
        _axis(axes[1], ways, "classes of a task (ways)")
    axes[0].set_ylim(0, 102)
    for axis in axes:
        axis.legend(loc="lower right" if axis is axes[0] else "best", frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    return figure


CHANCE = {"color": "0.5", "linewidth": 1, "linestyle": ":", "label": "chance"}


def _line(
    axis: Axes, x: Sequence[int], points: Sequence[Point], label: str, colour: object
) -> None:
    """A line with its 95 % band."""
    mean = 100 * np.array([p.accuracy for p in points])
    half = 100 * np.array([p.ci95 for p in points])
    axis.plot(x, mean, "o-", color=colour, markersize=4, label=label)
    axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.25, linewidth=0)


def _axis(axis: Axes, ticks: Iterable[int], label: str) -> None:
    """Logarithmic, with the numbers that were tried."""
    axis.set_xscale("log")
    axis.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    axis.minorticks_off()
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def reliability_figure(
    before: Reliability, after: Reliability, temperature: float, title: str
) -> Figure:
    """Accuracy of the queries by confidence, before and after temperature scaling.

    Below each diagram is how the queries are spread over its bins.
    """
    figure = new_figure(7.2, 4.4)
    rows = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=[3, 1])
    names = ("as trained", f"temperature {temperature:.3g}")
    for column, found, name in zip(rows.T, (before, after), names, strict=True):
        bins = len(found.counts)
        left, full = np.arange(bins) / bins, found.counts > 0
        upper, lower = column
        style = {"width": 1 / bins, "align": "edge", "edgecolor": "white", "linewidth": 0.6}
        upper.bar(left[full], found.accuracies[full], color=PALE, label="accuracy", **style)
        gap = found.confidences[full] - found.accuracies[full]
        upper.bar(
            left[full], gap, bottom=found.accuracies[full], label="gap to the mean confidence",
            **style | {"facecolor": "none", "edgecolor": WRONG, "hatch": "/////"},
        )  # fmt: skip
        upper.plot([0, 1], [0, 1], color="0.3", linewidth=1, linestyle="--", label="calibrated")
        upper.set_title(f"{name}: ECE {100 * found.ece():.1f} %", fontsize=9)
        upper.set(xlim=(0, 1), ylim=(0, 1))
        lower.bar(left, 100 * found.counts / found.counts.sum(), color="0.6", **style)
        lower.set_xlabel("confidence")
        for axis in column:
            axis.spines[["top", "right"]].set_visible(False)
    rows[0, 0].set_ylabel("accuracy")
    rows[1, 0].set_ylabel("queries, %")
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    handles, labels = rows[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure
