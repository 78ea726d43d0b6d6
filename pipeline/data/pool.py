"""ImagePool: every image of a data set, decoded once, memory-mapped from disk. Floor 1."""

import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.errors import UserError

PROJECT = Path(__file__).resolve().parents[2]
DATA_DIR = Path(os.environ.get("PIPELINE_DATA") or PROJECT / "data")
CACHE_FORMAT = 1

Allocate = Callable[[int, int, int, int], np.ndarray]
"""(n, C, H, W) to a writable uint8 array of that shape, on disk."""
Build = Callable[[Allocate], tuple[np.ndarray, Sequence[str]]]
"""Fills an allocated array; returns labels (m,), m <= n rows that are in use, and class names."""


@dataclass(frozen=True)
class ImagePool:
    """Images with their classes.

    Attributes:
        images: (n, C, H, W) uint8, usually a read-only memory map.
        labels: (n,) int64, index into `class_names`.
        class_names: one unique name a class.
        fingerprint: SHA-256 (hex) of images, labels and class names.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, c, h, w = self.images.shape
        return c, h, w

    @classmethod
    def from_arrays(
        cls, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
    ) -> "ImagePool":
        """Check and fingerprint arrays already in memory.

        Raises:
            UserError: if shapes, dtype or labels do not fit together.
        """
        labels = np.asarray(labels, dtype=np.int64)
        if images.dtype != np.uint8 or images.ndim != 4:
            raise UserError(
                f"pool: images must be uint8 (n, C, H, W); found {images.dtype} {images.shape}"
            )
        if len(labels) != len(images):
            raise UserError(f"pool: {len(images)} images but {len(labels)} labels")
        if len(set(class_names)) != len(class_names):
            raise UserError("pool: class names are not unique")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
            raise UserError(f"pool: labels must lie in 0..{len(class_names) - 1}")
        return cls(images, labels, tuple(class_names), _sha256(images, labels, class_names))


Splits = Mapping[str, Sequence[str]]
"""Class names of "train", "val" and "test"; a split without classes is an empty sequence."""


class SplitPool(NamedTuple):
    """What an image source loads: all its images and which classes belong to which split."""

    pool: ImagePool
    splits: Splits


class ImageSource(Protocol):
    """A data set: a cheap constructor that keeps its arguments, and `load`."""

    name: str

    def load(self) -> SplitPool:
        """Decode, or open the cache.

        Raises:
            UserError: if the data is missing (with the command or link that gets it) or damaged.
        """
        ...


def cached_pool(
    name: str, recipe: Mapping[str, object], build: Build, cache_dir: Path | None = None
) -> ImagePool:
    """Open the pool that `recipe` describes, building it first if no cache holds it.

    The build happens in a folder of its own that is renamed when complete, so a killed build
    leaves no half cache and two processes may build at once (the first one to finish wins).

    Args:
        name: of the data set; begins the folder's name.
        recipe: everything the images depend on (JSON-able): source files with sizes and times,
            image size, generator version. Another recipe is another cache.
        build: see `Build`.
        cache_dir: parent folder; `data/cache` of the project by default.

    Raises:
        UserError: if the cache folder cannot be written.
    """
    cache_dir = cache_dir or DATA_DIR / "cache"
    key = hashlib.sha256(
        json.dumps([CACHE_FORMAT, name, recipe], sort_keys=True, default=str).encode()
    ).hexdigest()[:16]
    target = cache_dir / f"{name}-{key}"
    if not (target / "meta.json").exists():
        _build_into(target, name, recipe, build)
    meta = json.loads((target / "meta.json").read_text())
    return ImagePool(
        images=np.load(target / "images.npy", mmap_mode="r"),
        labels=np.load(target / "labels.npy"),
        class_names=tuple(meta["class_names"]),
        fingerprint=meta["fingerprint"],
    )


def _build_into(target: Path, name: str, recipe: Mapping[str, object], build: Build) -> None:
    owner = f"{socket.gethostname()}-{os.getpid()}"
    work = target.with_name(f"{target.name}.part-{owner}-{uuid.uuid4().hex[:8]}")
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"data cache {target.parent}: cannot be written ({error})") from error
    _sweep_abandoned(target.parent)
    try:
        images: list[np.ndarray] = []

        def allocate(n: int, c: int, h: int, w: int) -> np.ndarray:
            file = work / "images.npy"
            images.append(
                np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(n, c, h, w))
            )
            return images[-1]

        labels, class_names = build(allocate)
        if len(labels) < len(images[-1]):  # some files were skipped: keep the rows in use
            kept = work / "kept.npy"
            np.save(kept, images[-1][: len(labels)])
            kept.replace(work / "images.npy")
            images.append(np.load(work / "images.npy", mmap_mode="r"))
        pool = ImagePool.from_arrays(images[-1], labels, class_names)
        np.save(work / "labels.npy", pool.labels)
        meta = {
            "name": name,
            "fingerprint": pool.fingerprint,
            "class_names": pool.class_names,
            "recipe": recipe,
        }
        (work / "meta.json").write_text(json.dumps(meta, indent=1, default=str))
        try:
            work.rename(target)
        except OSError:
            if not (target / "meta.json").exists():  # not a lost race: a real failure
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep_abandoned(cache_dir: Path) -> None:
    """Remove the part folders of builds on this host whose process is gone."""
    for part in cache_dir.glob(f"*.part-{socket.gethostname()}-*"):
        pid = int(part.name.split("-")[-2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(part, ignore_errors=True)
        except PermissionError:  # alive, another user's
            pass


def _sha256(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([images.shape, list(class_names)]).encode())
    digest.update(np.ascontiguousarray(labels).tobytes())
    step = max(1, 2**26 // max(1, int(np.prod(images.shape[1:]))))  # 64 MiB at a time
    for start in range(0, len(images), step):
        digest.update(np.ascontiguousarray(images[start : start + step]).tobytes())
    return digest.hexdigest()
