"""CIFAR-FS and FC100: two class splits of CIFAR-100 (Krizhevsky 2009). Floor 1."""

import json
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.data.decode import decode_pool, upright
from pipeline.data.files import Entry, scan
from pipeline.data.pool import DATA_DIR, Allocate, ImagePool, SplitPool, cached_pool
from pipeline.errors import UserError

LINK = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
_TORCHVISION = "cifar-100-python"
IMAGES_PER_CLASS = 600
_SPLITS = Path(__file__).parent / "splits"


class Cifar:
    """All 600 images a class (CIFAR-100's training and test part together), 32x32 RGB.

    Args:
        split: "cifar_fs" (64 / 16 / 20 classes, Bertinetto et al. 2019) or "fc100" (60 / 20 / 20,
            no superclass in two splits, Oreshkin et al. 2018).
        root: a tree `.../CLASS/IMAGE`, a folder of zips of such trees, or one that holds
            torchvision's `cifar-100-python`; None downloads to `data/cifar100` of the project.
        cache_dir: see `cached_pool`; both splits share one cache.
    """

    def __init__(
        self, split: Literal["cifar_fs", "fc100"], root: str | None, cache_dir: str | None = None
    ) -> None:
        self.name: str = split
        self.root = None if root is None else Path(root).expanduser()
        self.cache_dir = None if cache_dir is None else Path(cache_dir)

    def load(self) -> SplitPool:
        """Decode, or open the cache.

        Raises:
            UserError: if images are missing, unreadable or not 32x32, or the download fails.
        """
        found = json.loads((_SPLITS / f"{self.name}.json").read_text())
        splits: dict[str, list[str]] = {s: found[s] for s in ("train", "val", "test")}
        wanted = {name for names in splits.values() for name in names}
        if self.root is None or (self.root / _TORCHVISION).is_dir():
            pool = self._from_torchvision()
        else:
            pool = self._from_images(self.root, wanted)
        if missing := sorted(wanted - set(pool.class_names)):
            raise UserError(
                f"data.root={self.root}: no images of {len(missing)} of the {len(wanted)} classes "
                f"of {self.name}: {', '.join(missing[:5])}{', ...' if missing[5:] else ''}"
            )
        _refuse_partial(pool, wanted, self.root)
        return SplitPool(pool, splits)

    def _from_images(self, root: Path, wanted: set[str]) -> ImagePool:
        if not root.exists():
            raise UserError(f"data.root={root}: not found; {_WANTED}")
        entries = [e for e in scan(root) if len(e.parts) > 1 and _class_of(e) in wanted]
        zipped = {_class_of(e) for e in entries if e.zipped}
        # Zips that were also unpacked beside themselves must not count twice.
        entries = [e for e in entries if e.zipped or _class_of(e) not in zipped]
        if not entries:
            raise UserError(f"data.root={root}: no image of a CIFAR-100 class; {_WANTED}")
        return decode_pool(
            "cifar100", entries, _class_of, _fit, (3, 32, 32), recipe={}, cache_dir=self.cache_dir
        )

    def _from_torchvision(self) -> ImagePool:
        root = self.root or DATA_DIR / "cifar100"
        files = [root / _TORCHVISION / part for part in ("train", "test", "meta")]
        if not all(file.is_file() for file in files):
            _torchvision_parts(root, download=self.root is None)
        stats = [file.stat() for file in files]
        recipe = {"files": [(str(root.resolve()), s.st_size, s.st_mtime_ns) for s in stats]}
        build = partial(_build, root, self.root is None)
        return cached_pool("cifar100", recipe, build, self.cache_dir)


def _refuse_partial(pool: ImagePool, wanted: set[str], root: Path | None) -> None:
    counts = np.bincount(pool.labels, minlength=len(pool.class_names))
    for name, count in zip(pool.class_names, counts, strict=True):
        if name in wanted and count != IMAGES_PER_CLASS:
            raise UserError(
                f"data.root={root}: {count} images of class {name!r}; both splits take all "
                f"{IMAGES_PER_CLASS}, CIFAR-100's training and test images together"
            )


_WANTED = (
    "expected folders named as the classes (apple, aquarium_fish, ...), zips of them, or "
    f"{_TORCHVISION} unpacked from {LINK}; data.root=null downloads it"
)


def _class_of(entry: Entry) -> str:
    return entry.parts[-2]


def _fit(image: Image.Image) -> Image.Image:
    if image.size != (32, 32):
        raise ValueError(f"{image.width}x{image.height} pixels; CIFAR-100's are 32x32")
    return upright(image, "RGB")


def _build(root: Path, download: bool, allocate: Allocate) -> tuple[np.ndarray, list[str]]:
    parts, class_names = _torchvision_parts(root, download)
    images = allocate(sum(len(pixels) for pixels, _ in parts), 3, 32, 32)
    np.concatenate([pixels.transpose(0, 3, 1, 2) for pixels, _ in parts], out=images)
    return np.concatenate([labels for _, labels in parts]), class_names


def _torchvision_parts(
    root: Path, download: bool
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[str]]:
    """Images (n, 32, 32, 3) uint8 and labels (n,) of both parts, checked by MD5; class names."""
    from torchvision.datasets import CIFAR100

    try:
        sets = [CIFAR100(str(root), train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        done = f"download of {LINK} failed" if download else f"{_TORCHVISION} is damaged"
        raise UserError(
            f"data.root={root}: {done} ({' '.join(str(error).split())}); unpack the original "
            f"there, or let data.root name a folder that holds {_TORCHVISION} or class folders"
        ) from error
    return [(s.data, np.asarray(s.targets)) for s in sets], list(sets[0].classes)
