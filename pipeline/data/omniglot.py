"""Omniglot: handwritten characters, 20 drawers each (Lake, Salakhutdinov, Tenenbaum 2015). Floor 1.

Source: https://github.com/brendenlake/omniglot (MIT licence).
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from pipeline.annotations import PositiveInt
from pipeline.data.decode import decode_into, label, upright
from pipeline.data.files import Entry, digest, scan
from pipeline.data.pool import DATA_DIR, Allocate, SplitPool, cached_pool
from pipeline.errors import UserError

LINK = "https://github.com/brendenlake/omniglot/tree/master/python"
_BACKGROUND, _EVALUATION = "images_background", "images_evaluation"
_SMALL1, _SMALL2 = "images_background_small1", "images_background_small2"
_SETS = {
    "vinyals": (_BACKGROUND, _EVALUATION),
    "minimal1": (_SMALL1, _EVALUATION),
    "minimal2": (_SMALL2, _EVALUATION),
    "small1_to_small2": (_SMALL1, _SMALL2),
}
# The smallest alphabet of each set that still fills 20-way tasks.
_VALIDATION = {_SMALL1: "Early_Aramaic", _SMALL2: "Greek"}
_ONLY_SMALL2 = ("Sanskrit", "Japanese_(katakana)", "Tagalog")
_VINYALS = Path(__file__).parent / "splits" / "omniglot_vinyals.json"


class Omniglot:
    """Characters as classes named `ALPHABET/characterNN`; grey, ink 255 on 0.

    Args:
        root: folder with the original zips or the folders in them; None downloads what the split
            needs to `data/omniglot` of the project.
        split: "vinyals": 1028 / 172 / 423 characters (Vinyals et al. 2016), from the background
            and the evaluation set. "minimal1", "minimal2": a small background set, one alphabet
            of which is validation; the test is the evaluation set. "small1_to_small2": trains on
            small1 but for one alphabet, tests on the three alphabets that only small2 has.
        image_size: H = W of the images; the originals have 105.
        rotations: add the training characters turned by 90, 180 and 270 degrees as classes of
            their own, `NAME@90` and so on.
        cache_dir: see `cached_pool`.
    """

    def __init__(
        self,
        root: str | None,
        split: Literal["vinyals", "minimal1", "minimal2", "small1_to_small2"],
        image_size: PositiveInt,
        rotations: bool,
        cache_dir: str | None = None,
    ) -> None:
        self.root = None if root is None else Path(root).expanduser()
        self.split: str = split
        self.name = "omniglot" if split == "vinyals" else f"omniglot_{split}"
        self.image_size, self.rotations = image_size, rotations
        self.cache_dir = None if cache_dir is None else Path(cache_dir)

    def load(self) -> SplitPool:
        """Decode, or open the cache.

        Raises:
            UserError: if a set is missing, incomplete or damaged, or its download fails.
        """
        first, second = (self._entries(images) for images in _SETS[self.split])
        splits = _vinyals() if self.split == "vinyals" else self._alphabets(first, second)
        entries = _select(first, second, splits, self.split)
        turned = splits["train"] if self.rotations else []
        size = (self.image_size, self.image_size)

        def fit(image: Image.Image) -> Image.Image:
            grey = upright(image, "L").resize(size, Image.Resampling.LANCZOS)
            return ImageOps.invert(grey)

        def build(allocate: Allocate) -> tuple[np.ndarray, list[str]]:
            labels, names = label(entries, _class_of)
            rows = np.flatnonzero(np.isin(np.array(names)[labels], turned))
            images = allocate(len(entries) + 3 * len(rows), 1, *size)
            decode_into(images, entries, fit, "omniglot")
            return _turn(images, labels, names, rows)

        recipe = {"files": digest(entries), "size": self.image_size, "turned": sorted(turned)}
        pool = cached_pool("omniglot", recipe, build, self.cache_dir)
        train = [*splits["train"], *(f"{c}@{a}" for a in (90, 180, 270) for c in turned)]
        return SplitPool(pool, {**splits, "train": train})

    def _entries(self, images: str) -> list[Entry]:
        root = self.root or DATA_DIR / "omniglot"
        if self.root is None and not _find(root, images):
            _download(root, images)
        if not (found := _find(root, images)):
            raise UserError(
                f"data.root={root}: neither {images}.zip nor a folder {images}, which data.split="
                f"{self.split} needs; get the zip from {LINK}"
            )
        return [e for e in scan(found) if len(e.parts) > 2]

    def _alphabets(self, first: Sequence[Entry], second: Sequence[Entry]) -> dict[str, list[str]]:
        background, other = _SETS[self.split]
        known = sorted(set(map(_class_of, first)))
        test = sorted(set(map(_class_of, second)))
        if other == _SMALL2:  # Greek and Latin are in both small sets
            test = [c for c in test if c.split("/")[0] in _ONLY_SMALL2]
        val = [c for c in known if c.split("/")[0] == _VALIDATION[background]]
        return {"train": [c for c in known if c not in val], "val": val, "test": test}


def _class_of(entry: Entry) -> str:
    return "/".join(entry.parts[-3:-1])


def _vinyals() -> dict[str, list[str]]:
    listed = json.loads(_VINYALS.read_text())
    return {
        split: [
            f"{alphabet}/character{i:02d}"
            for alphabet, (start, stop) in listed[split].items()
            for i in range(start, stop + 1)
        ]
        for split in ("train", "val", "test")
    }


def _select(
    first: Sequence[Entry], second: Sequence[Entry], splits: Mapping[str, Sequence[str]], split: str
) -> list[Entry]:
    """The entries of the split's classes, a class of both sets from the first one only."""
    wanted = {name for names in splits.values() for name in names}
    entries = [e for e in first if _class_of(e) in wanted]
    have = set(map(_class_of, entries))
    entries += [e for e in second if _class_of(e) in wanted - have]
    missing = sorted(wanted - set(map(_class_of, entries)))
    empty = [name for name, names in splits.items() if not names]
    if missing or empty:
        what = f"{len(missing)} characters ({missing[0]}, ...)" if missing else f"split {empty[0]}"
        raise UserError(
            f"data.split={split}: no images of {what} in {' and '.join(_SETS[split])}; they are "
            f"incomplete: get the original zips from {LINK}"
        )
    return entries


def _turn(
    images: np.ndarray, labels: np.ndarray, names: list[str], rows: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Append the images of `rows` turned by 90, 180 and 270 degrees, as classes of their own.

    Args:
        images: (n + 3 * len(rows), 1, H, W), of which n are filled.
        labels: (n,), index into `names`.
        names: class names.
        rows: (m,) the images to turn.

    Returns:
        Labels of all images, and the class names they index.
    """
    olds = np.unique(labels[rows])
    new_of = np.zeros(len(names), dtype=np.int64)
    new_of[olds] = np.arange(len(olds))
    all_labels, all_names, end = [labels], list(names), len(labels)
    for quarters in (1, 2, 3):
        images[end : end + len(rows)] = np.rot90(images[rows], quarters, axes=(2, 3))
        end += len(rows)
        all_labels.append(new_of[labels[rows]] + len(all_names))
        all_names += [f"{names[i]}@{90 * quarters}" for i in olds]
    return np.concatenate(all_labels), all_names


def _find(root: Path, images: str) -> Path | None:
    """The zip or the folder of a set; the zip first, as a folder may be half unpacked."""
    places = (root, root / "omniglot-py")  # the latter is torchvision's
    candidates = [place / name for place in places for name in (f"{images}.zip", images)]
    return next((path for path in candidates if path.exists()), None)


def _download(root: Path, images: str) -> None:
    from torchvision import datasets
    from torchvision.datasets.utils import download_url

    url = f"{datasets.Omniglot.download_url_prefix}/{images}.zip"
    md5 = datasets.Omniglot.zips_md5.get(images)  # it knows none for the small sets
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as part:  # a broken download leaves nothing
            download_url(url, part, md5=md5)
            (Path(part) / f"{images}.zip").replace(root / f"{images}.zip")
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        raise UserError(
            f"data.root=null: download of {url} to {root} failed ({' '.join(str(error).split())}); "
            f"get the zip from {LINK} and let data.root name its folder"
        ) from error
