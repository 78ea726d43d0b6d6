"""A small classifier of small photos, made in no time."""

from pathlib import Path

import numpy as np
import torch

from pipeline import config, sources
from pipeline.classifier import PhotoClassifier
from pipeline.compose import compose_config
from pipeline.trained import Given

SIDE = 14
NAMES = ("disc", "ring & <dot>", "confidence")  # also a name that a column of answers has


def strokes(per_class: int, seed: int = 0, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Noisy photos (n, C, S, S) uint8 of as many shapes as there are `NAMES`, and their labels."""
    random = np.random.default_rng(seed)
    shapes = np.zeros((len(NAMES), channels, SIDE, SIDE))
    shapes[0, :, 3:11, 3:11] = 200
    shapes[1, :, ::4] = 200
    shapes[2, :, :, :7] = 200
    labels = np.repeat(np.arange(len(NAMES)), per_class)
    noisy = shapes[labels] + random.uniform(0, 50, (len(labels), channels, SIDE, SIDE))
    return noisy.astype(np.uint8), labels


def tiny_given(*overrides: str, channels: int = 1) -> Given:
    """An untrained learner of photos of SIDE; by default ProtoNet on a Conv4 of width 8."""
    chosen = [o for o in overrides if o.startswith("learner=")] or ["learner=protonet"]
    fixed = [
        "data=image_folder",
        "data.root=photos",
        f"data.image_shape=[{channels},{SIDE},{SIDE}]",
    ]
    network = (
        []
        if any(o.startswith("backbone=") for o in overrides)
        else ["backbone.width=8", "backbone.downsample=stride"]
    )
    cfg = compose_config("train", [*chosen, *fixed, *network, *(set(overrides) - set(chosen))])
    torch.manual_seed(0)
    learner = config.build_learner(cfg, sources.image_shape(cfg.data)).eval()
    described = {"learner": learner.label, "backbone": "tiny", "protocol": learner.protocol}
    return Given(learner, cfg, described | {"run": "a" * 32})


def tiny_classifier(*overrides: str, channels: int = 1) -> PhotoClassifier:
    """That learner adapted to 8 photos of each of `NAMES`, calibrated."""
    photos, labels = map(torch.from_numpy, strokes(8, channels=channels))
    classifier = PhotoClassifier(tiny_given(*overrides, channels=channels), photos, labels, NAMES)
    classifier.calibrate()
    return classifier.eval()


def saved(classifier: PhotoClassifier, folder: Path) -> Path:
    classifier.save(folder / "classifier.pt")
    return folder / "classifier.pt"
