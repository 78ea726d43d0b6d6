"""How far can `adapt` be believed: its estimate, its confidence, its rejection?

Tasks as a user sets them, of test classes of CIFAR-FS: so many classes with so many photos each,
50 further photos of each class, and as many of classes that the classifier was never shown.

    python -m benchmarks.photos data.root=FOLDER_OF_CLASS_FOLDERS_OR_ZIPS
    python -m benchmarks.photos data.root=... run=RUN_ID     a run instead of the default model

Writes docs/photos_rejection.png and prints the tables of docs/photos.md. Images are embedded once,
so a learner with embeddings and an inductive network is needed.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.harness import table
from pipeline import config
from pipeline.calibration import auroc, conformal_p, coverage_accuracy, ece
from pipeline.classifier import calibration, scores
from pipeline.compose import compose_config
from pipeline.data.transforms import to_float
from pipeline.learners.embedding import EMBED_BATCH, EmbeddingLearner
from pipeline.learners.held_out import held_out_logits
from pipeline.progress import scoring
from pipeline.trained import given_learner

TASKS, QUERIES, REJECT = 400, 50, 0.05
IMAGES = 120  # of a class, from which tasks draw
SHAPES = ((5, 1), (5, 5), (8, 3), (8, 5), (8, 10))  # ways, photos a class


class Outcome(NamedTuple):
    """Of one task.

    Attributes:
        accuracy: on photos of its classes.
        estimate, inside: by held-out photos, and whether its interval holds the accuracy.
        ece_raw, ece: of the confidences before and after the temperature.
        auroc: of photos of its classes against others, by score.
        refused_known, refused_unknown: shares said to look like none of the classes.
        kept: accuracy on what is not rejected.
        confidence, right: of each photo of its classes, (q,).
        p_known, p_unknown: of each photo of its classes, and of others.
    """

    accuracy: float
    estimate: float
    inside: bool
    ece_raw: float
    ece: float
    auroc: float
    refused_known: float
    refused_unknown: float
    kept: float
    confidence: np.ndarray
    right: np.ndarray
    p_known: np.ndarray
    p_unknown: np.ndarray


class Bank:
    """Embeddings of all images of a split, and tasks drawn from them."""

    def __init__(self, overrides: list[str], split: str) -> None:
        own = [o for o in overrides if o.partition("=")[0] in ("run", "checkpoint")]
        given = given_learner(compose_config("adapt", ["support=none", *own]))
        assert isinstance(given.learner, EmbeddingLearner)
        self.learner = given.learner
        rest = [o for o in overrides if o not in own]
        data = config.build_data(compose_config("train", ["data=cifar_fs", *rest]).data)
        self.labels = data.pool.labels
        rows = np.concatenate(
            [np.flatnonzero(self.labels == c)[:IMAGES] for c in data.classes(split)]
        )
        self.classes, self.row = np.array(data.classes(split)), np.full(len(self.labels), -1)
        self.row[rows] = np.arange(len(rows))
        shape, cfg = given.photo_shape, given.cfg.data
        parts = []
        with torch.inference_mode(), scoring("images") as begin:
            done = begin("embedded", len(rows))
            for part in torch.from_numpy(rows).split(EMBED_BATCH):
                images = torch.from_numpy(data.pool.images[part.numpy()])
                parts.append(self.learner.embed(to_float(images, shape, cfg.mean, cfg.std)))
                done(sum(map(len, parts)))
        self.z = torch.cat(parts)
        self.learner.embed = lambda x: x  # what follows is given embeddings

    def draw(
        self, random: np.random.Generator, ways: int, shots: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Support (ways*shots, d), queries of its classes (ways*QUERIES, d), others (same, d)."""
        order = random.permutation(self.classes)

        def of(chosen: np.ndarray, number: int) -> Tensor:
            own = [np.flatnonzero((self.labels == c) & (self.row >= 0)) for c in chosen]
            picked = [random.choice(images, number, False) for images in own]
            return self.z[self.row[np.array(picked)]]  # (classes, number, d)

        known = of(order[:ways], shots + QUERIES)
        other = of(order[ways : 2 * ways], QUERIES)
        return (part.flatten(0, 1) for part in (known[:, :shots], known[:, shots:], other))


@torch.inference_mode()
def task(bank: Bank, random: np.random.Generator, ways: int, shots: int) -> Outcome:
    """Draw a task and do what `adapt` does."""
    support, query, other = bank.draw(random, ways, shots)
    support_y = torch.arange(ways).repeat_interleave(shots)
    y = np.repeat(np.arange(ways), QUERIES)
    estimate, temperature, known = calibration(
        *held_out_logits(bank.learner, support, support_y), support_y
    )
    classify = bank.learner.adapt(support, support_y)
    raw = classify(query)
    logits, others = raw / temperature, classify(other) / temperature
    probabilities = logits.softmax(1).numpy()
    right = probabilities.argmax(1) == y
    p_known, p_unknown = (conformal_p(scores(part), known) for part in (logits, others))
    kept = right[p_known > REJECT]
    low, high = estimate.interval
    return Outcome(
        float(right.mean()),
        estimate.accuracy,
        bool(low <= right.mean() <= high),
        ece(raw.softmax(1), y),
        ece(probabilities, y),
        auroc(scores(logits), scores(others)),
        float((p_known <= REJECT).mean()),
        float((p_unknown <= REJECT).mean()),
        float(kept.mean()) if len(kept) else float("nan"),
        probabilities.max(1),
        right,
        p_known,
        p_unknown,
    )


def figure(found: list[Outcome], title: str) -> Figure:
    """Coverage against accuracy, and what is rejected of either kind at each level."""
    drawn = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    grid = np.linspace(0.05, 1, 96)
    curves = [np.interp(grid, *coverage_accuracy(o.confidence, o.right)) for o in found]
    low, high = np.percentile(100 * np.array(curves), (10, 90), axis=0)
    left.plot(100 * grid, 100 * np.mean(curves, 0), color="#1f77b4")
    left.fill_between(100 * grid, low, high, color="#1f77b4", alpha=0.15, linewidth=0)
    left.set(xlabel="photos kept, the most confident first, %", ylabel="accuracy of those, %")
    levels = np.linspace(0, 0.5, 101)
    for what, colour in (("p_known", "#1f77b4"), ("p_unknown", "#d62728")):
        p = np.concatenate([getattr(o, what) for o in found])
        label = "of the classes" if what == "p_known" else "of other classes"
        right.plot(100 * levels, [100 * (p <= a).mean() for a in levels], color=colour, label=label)
    right.plot([0, 50], [0, 50], color="0.5", linestyle="--", linewidth=1, label="as promised")
    right.set(xlabel="reject, %", ylabel="said to look like none, %")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    drawn.suptitle(title, x=0.01, ha="left", fontsize=9)
    return drawn


def main(overrides: list[str]) -> None:
    """Measure, print, draw."""
    mpl.rcParams["svg.fonttype"] = "none"
    bank = Bank(overrides, "test")
    rows, pictured = [], []
    for ways, shots in SHAPES:
        random = np.random.default_rng(0)
        found = [task(bank, random, ways, shots) for _ in range(TASKS)]
        numbers = np.array([o[:9] for o in found], dtype=float)
        means = 100 * np.nanmean(numbers, axis=0) if shots > 1 else 100 * numbers.mean(0)
        rows.append([f"{ways}-way {shots}-shot", *(f"{m:.1f}" for m in means)])
        if (ways, shots) == (8, 5):
            pictured = found
    header = ["task", "accuracy", "estimate", "interval holds it", "ECE raw", "ECE", "AUROC",
              "known rejected", "unknown rejected", "accuracy of the kept"]  # fmt: skip
    print(f"{bank.learner.label}, {TASKS} tasks of CIFAR-FS test classes, %, reject={REJECT}\n")
    print(table(header, rows))
    title = f"{bank.learner.label}, {TASKS} tasks of CIFAR-FS test classes, 8-way 5-shot"
    out = Path(__file__).resolve().parents[1] / "docs" / "photos_rejection.png"
    figure(pictured, title).savefig(out, dpi=110)
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
