"""ImagePool: every image of a data set, decoded once, memory-mapped from disk. Floor 1."""

import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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

    def __reduce__(self) -> tuple[Any, ...]:
        """A memory map goes to a loader process as the name of its folder, not as all its bytes."""
        if isinstance(self.images, np.memmap):
            return _open, (Path(str(self.images.filename)).parent,)
        return ImagePool, (self.images, self.labels, self.class_names, self.fingerprint)

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
    return _open(target)


def _open(folder: Path) -> ImagePool:
    meta = json.loads((folder / "meta.json").read_text())
    return ImagePool(
        images=np.load(folder / "images.npy", mmap_mode="r"),
        labels=np.load(folder / "labels.npy"),
        class_names=tuple(meta["class_names"]),
        fingerprint=meta["fingerprint"],
    )


def _build_into(target: Path, name: str, recipe: Mapping[str, object], build: Build) -> None:
    owner = f"{socket.gethostname()}-{os.getpid()}"
    work = target.with_name(f"{target.name}.part-{owner}-{uuid.uuid4().hex[:8]}")
    with _writing(target.parent):
        work.mkdir(parents=True)
    _sweep_abandoned(target.parent)
    try:
        images: list[np.ndarray] = []

        def allocate(n: int, c: int, h: int, w: int) -> np.ndarray:
            with _writing(target.parent):
                images.append(_allocate(work / "images.npy", (n, c, h, w)))
            return images[-1]

        labels, class_names = build(allocate)
        with _writing(target.parent):
            _finish(work, images[-1], labels, class_names, {"name": name, "recipe": recipe})
            _put_in_place(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"data cache {folder}: cannot be written ({error})") from error


def _finish(
    work: Path,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    meta: dict[str, Any],
) -> None:
    """Cut off the rows that are not in use, and add labels and what describes the pool."""
    if len(labels) < len(images):  # some files were skipped
        kept = work / "kept.npy"
        np.save(kept, images[: len(labels)])
        kept.replace(work / "images.npy")
        images = np.load(work / "images.npy", mmap_mode="r")
    pool = ImagePool.from_arrays(images, labels, class_names)
    np.save(work / "labels.npy", pool.labels)
    meta |= {"fingerprint": pool.fingerprint, "class_names": pool.class_names}
    (work / "meta.json").write_text(json.dumps(meta, indent=1, default=str))


def _put_in_place(work: Path, target: Path) -> None:
    try:
        work.rename(target)
    except OSError as error:
        if not (target / "meta.json").exists():  # not a lost race
            raise UserError(f"{target}: is in the way of a cache; remove it") from error


def _allocate(file: Path, shape: tuple[int, int, int, int]) -> np.ndarray:
    """A file of that many bytes, mapped; taken now, as a full disk would kill a later write."""
    images = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return images


def _sweep_abandoned(cache_dir: Path) -> None:
    """Remove the part folders of builds on this host whose process is gone."""
    for part in cache_dir.glob(f"*.part-{socket.gethostname()}-*"):
        host, pid = part.name.partition(".part-")[2].rsplit("-", 2)[0], part.name.split("-")[-2]
        if host != socket.gethostname():  # "gpu" is not "gpu-1"
            continue
        try:
            os.kill(int(pid), 0)
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
