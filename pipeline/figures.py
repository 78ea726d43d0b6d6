"""Pictures for people: an episode with its predictions, accuracies, an inner loop. Floor 1."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.colors
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.episode import Episode

SUPPORT, RIGHT, WRONG = "#4a6fa5", "#2a9d5c", "#d1495b"
BORDER = 2  # pixels of frame around an image
mpl.rcParams["font.size"] = 8
mpl.rcParams["text.parse_math"] = False  # class names may hold dollars


def new_figure(width: float, height: float) -> Figure:
    """A figure that no window system and no global state knows of."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def short(name: str, most: int = 34) -> str:
    """The end of a long name."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def episode_figure(
    support: np.ndarray,
    query: np.ndarray,
    correct: np.ndarray,
    predicted: np.ndarray,
    class_names: list[str],
    title: str,
) -> Figure:
    """Each class a row: its support images, then its queries, framed green if right, else red.

    Args:
        support: (n_way, k_shot, C, H, W) uint8.
        query: (n_way, n_query, C, H, W) uint8.
        correct: (n_way, n_query) bool.
        predicted: (n_way, n_query) label that the classifier gave, 0..n_way-1.
        class_names: n_way names.
    """
    n_way, k_shot = support.shape[:2]
    n_query = min(query.shape[1], 15)
    images = np.concatenate([support, query[:, :n_query]], axis=1)  # (n_way, s+q, C, H, W)
    frames = np.full((n_way, k_shot + n_query), SUPPORT)
    frames[:, k_shot:] = np.where(correct[:, :n_query], RIGHT, WRONG)
    figure = new_figure(0.55 * (k_shot + n_query) + 1.4, 0.55 * n_way + 0.95)
    axis = figure.subplots()
    axis.imshow(_mosaic(images, frames), interpolation="nearest")
    tall, wide = (side + 2 * BORDER + 1 for side in images.shape[-2:])
    for row, column in zip(*np.nonzero(~correct[:, :n_query]), strict=True):
        x, y = (k_shot + column + 1) * wide - 3, row * tall + 2
        axis.text(
            x, y, str(predicted[row, column]), ha="right", va="top", color=WRONG, weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
        )  # fmt: skip
    axis.set_yticks(
        [(row + 0.5) * tall for row in range(n_way)],
        [f"{short(name)}  {row}" for row, name in enumerate(class_names)],
    )
    key = "queries: green right, red wrong with the row it was taken for"
    axis.set_xticks(
        [k_shot / 2 * wide, (k_shot + n_query / 2) * wide],
        ["support", textwrap.fill(key, max(14, 8 * n_query))],  # 8 letters fit below an image
    )
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, loc="left")
    return figure


def prediction_figure(
    task: Episode, predicted: Tensor, class_names: list[str], title: str
) -> Figure:
    """`episode_figure` of one task.

    Args:
        task: uint8, as the data set yields it, class by class.
        predicted: (n_way*n_query,) label that the classifier gave to each query.
        class_names: n_way names.
    """
    support, query, truth, given = (
        field.cpu().unflatten(0, (task.n_way, -1)).numpy()
        for field in (task.support_x, task.query_x, task.query_y, predicted)
    )
    return episode_figure(support, query, given == truth, given, class_names, title)


def _mosaic(images: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """(rows, columns, C, H, W) uint8 and a colour each -> one framed picture (H', W', 3) uint8.

    One picture instead of an axis an image: drawing is fifty times faster.
    """
    rows, columns, _, h, w = images.shape
    tall, wide = h + 2 * BORDER + 1, w + 2 * BORDER + 1
    out = np.full((rows * tall, columns * wide, 3), 255, dtype=np.uint8)
    for row in range(rows):
        for column in range(columns):
            y, x = row * tall, column * wide
            colour = np.array(mpl.colors.to_rgb(str(frames[row, column])))
            out[y : y + h + 2 * BORDER, x : x + w + 2 * BORDER] = (255 * colour).astype(np.uint8)
            inner = out[y + BORDER : y + BORDER + h, x + BORDER : x + BORDER + w]
            inner[:] = images[row, column].transpose(1, 2, 0)  # grey broadcasts to RGB
    return out


def class_accuracy_figure(accuracy: dict[str, float], title: str, most: int = 40) -> Figure:
    """Accuracy of each class, worst first; with many classes the worst and the best ones.

    Args:
        accuracy: class name to accuracy in 0..1 over all queries of that class.
    """
    ranked = sorted(accuracy.items(), key=lambda item: item[1])
    cut = len(ranked) > most
    shown = [*ranked[: most // 2], *ranked[-most // 2 :]] if cut else ranked
    figure = new_figure(7, 0.17 * len(shown) + 1.2)
    axis = figure.subplots()
    names = [short(name) for name, _ in shown]
    values = [100 * value for _, value in shown]
    mean = 100 * float(np.mean(list(accuracy.values())))
    axis.barh(range(len(shown)), values, color=[RIGHT if v >= mean else WRONG for v in values])
    axis.axvline(mean, color="black", linewidth=1, linestyle="--", label=f"mean {mean:.1f} %")
    if cut:
        axis.axhline(most // 2 - 0.5, color="grey", linewidth=1)
        title += f"\nworst and best {most // 2} of {len(ranked)} classes"
    axis.set(yticks=range(len(shown)), yticklabels=names, xlabel="accuracy, %", xlim=(0, 100))
    figure.suptitle(title, x=0.01, ha="left")
    axis.margins(y=0.01)
    axis.invert_yaxis()
    figure.legend(loc="outside upper right", frameon=False)
    return figure


def inner_loop_figure(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    steps: Sequence[int] | None = None,
    title: str = "",
) -> Figure:
    """Support loss and query accuracy against inner steps.

    Args:
        curves: by label; losses, and accuracies in 0..1, after each number of steps.
        steps: these numbers; None for 0, 1, ...
    """
    figure = new_figure(7, 2.6)
    left, right = figure.subplots(1, 2)
    for label, (losses, accuracies) in curves.items():
        x = range(len(losses)) if steps is None else steps
        left.plot(x, losses, marker="o", markersize=3, label=label)
        right.plot(x, [100 * a for a in accuracies], marker="o", markersize=3)
    left.set(title="loss on the support images", xlabel="inner steps", yscale="log")
    right.set(title="accuracy on the queries, %", xlabel="inner steps", ylim=(0, 100))
    left.yaxis.set_major_formatter("{x:g}")  # a power of ten would be mathematics, which is off
    left.yaxis.set_minor_formatter(lambda *_: "")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    if len(curves) > 1:
        figure.legend(loc="outside lower center", ncols=len(curves), frameon=False)
    return figure


class Curves(NamedTuple):
    """One function and what was made of it.

    Attributes:
        truth: (points,) its values.
        given: arguments and values (k_shot,) of the support set.
        predicted: (points,) by label, in the order of adaptation.
    """

    truth: np.ndarray
    given: tuple[np.ndarray, np.ndarray]
    predicted: Mapping[str, np.ndarray]


def curves_figure(x: np.ndarray, curves: Sequence[Curves], title: str) -> Figure:
    """Each function a panel: the true one, the points that were given, the adapted ones.

    Args:
        x: (points,) the arguments.
    """
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure(3.1 * columns, 2.2 * rows + 0.7)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    labels = list(curves[0].predicted)
    shades = mpl.colormaps["plasma"](np.linspace(0.78, 0.12, len(labels)))  # dark: adapted most
    widths = [1.3] * (len(labels) - 1) + [2]
    styles = [":"] * (len(labels) > 1) + ["-"] * len(labels)
    for panel, each in zip(panels, curves, strict=False):
        panel.plot(x, each.truth, color="0.8", linewidth=5, label="true function")
        for i, (label, y) in enumerate(each.predicted.items()):
            panel.plot(x, y, styles[i], color=shades[i], linewidth=widths[i], label=label)
        panel.plot(*each.given, "o", color="black", markersize=4.5, zorder=5, label="given points")
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0)
        if panel.get_subplotspec().is_last_row():
            panel.set_xlabel("x")
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel("y")
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure
