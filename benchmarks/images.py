"""The images that loading and evaluation are measured on: CIFAR-FS where it is, else noise."""

from pathlib import Path

from benchmarks.harness import ROOT
from pipeline.data.pool import DATA_DIR

TORCHVISION = "cifar-100-python"
_NOISE = {
    "_target_": "benchmarks.ours.RandomSource",
    "shape": [3, 32, 32],
    "classes": [64, 16, 20],
    "images": 600,
}


def source() -> tuple[str, dict[str, object]]:
    """What it is, and its configuration; nothing is downloaded."""
    root = _cifar_root()
    if root is None:
        return "random images in the numbers of CIFAR-FS", _NOISE
    cifar = {"_target_": "pipeline.data.cifar.Cifar", "split": "cifar_fs", "root": str(root)}
    return "CIFAR-FS", cifar


def _cifar_root() -> Path | None:
    """Class folders or zips beside the project, or torchvision's download in it."""
    beside = ROOT.parent / "shared/data/cifar100"
    if beside.is_dir():
        return beside
    inside = DATA_DIR / "cifar100"
    return inside if (inside / TORCHVISION).is_dir() else None
