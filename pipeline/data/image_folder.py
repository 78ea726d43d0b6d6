"""Any folder of classes: `root/CLASS/*.{png,jpg,jpeg,webp,bmp}`. Floor 1."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Len

from pipeline.annotations import Fraction, PositiveInt
from pipeline.data.decode import decode_pool, fit
from pipeline.data.files import SUFFIXES, Entry, scan
from pipeline.data.pool import SplitPool
from pipeline.errors import UserError

_SPLITS = ("train", "val", "test")
_WANTED = f"expected one folder a class with {', '.join(s[1:] for s in SUFFIXES)} files in it"


class ImageFolder:
    """Classes are the folders of `root`; images may lie at any depth below them.

    Args:
        root: the folder.
        image_size: H = W; the shorter side is resized to it, then the centre is cropped.
        channels: 1 for grey, 3 for RGB. Transparent images are put on white.
        fractions: of the classes for train, val and test; a fraction above 0 gets two at least.
        split_seed: shuffles the classes.
        split_file: JSON `{"train": [CLASS, ...], "val": [...], "test": [...]}` used instead of
            `fractions` and `split_seed`; classes it does not name are left out.
        skip_bad: leave out files that cannot be read instead of stopping at the first.
        cache_dir: see `cached_pool`.
    """

    def __init__(
        self,
        root: str,
        image_size: PositiveInt,
        channels: Literal[1, 3],
        fractions: Annotated[list[Fraction], Len(3, 3)],
        split_seed: int,
        split_file: str | None,
        skip_bad: bool,
        cache_dir: str | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        self.name = self.root.absolute().name
        self.image_size, self.channels = image_size, channels
        self.fractions, self.split_seed, self.skip_bad = list(fractions), split_seed, skip_bad
        self.split_file = None if split_file is None else Path(split_file).expanduser()
        self.cache_dir = None if cache_dir is None else Path(cache_dir)

    def load(self) -> SplitPool:
        """Decode, or open the cache.

        Raises:
            UserError: if the folder, a class, an image or the split is not as described above.
        """
        folders = self._class_folders()
        entries = [e for e in scan(self.root) if not e.zipped and len(e.parts) > 1]
        counts = Counter(map(_class_of, entries))
        if self.split_file:
            splits = read_splits(self.split_file, folders)
        else:
            splits = split_by_fractions(folders, self.fractions, self.split_seed)
        wanted = {name for names in splits.values() for name in names}
        for name in sorted(wanted):
            if not counts[name]:
                raise UserError(
                    f"data.root={self.root}: class folder {name!r} holds no image; {_WANTED}"
                )
        pool = decode_pool(
            "image_folder",
            [e for e in entries if _class_of(e) in wanted],
            _class_of,
            partial(fit, channels=self.channels, size=self.image_size),
            (self.channels, self.image_size, self.image_size),
            recipe={},
            skip_bad=self.skip_bad,
            cache_dir=self.cache_dir,
        )
        return SplitPool(pool, splits)

    def _class_folders(self) -> list[str]:
        if not self.root.is_dir():
            found = "not a folder" if self.root.exists() else "not found"
            raise UserError(f"data.root={self.root}: {found}; {_WANTED}")
        try:
            folders = [p.name for p in self.root.iterdir() if p.is_dir() and p.name[0] != "."]
        except OSError as error:
            raise UserError(f"data.root={self.root}: cannot be read ({error.strerror})") from error
        if not folders:
            raise UserError(f"data.root={self.root}: no class folders; {_WANTED}")
        return sorted(folders)


def _class_of(entry: Entry) -> str:
    return entry.parts[0]


def split_by_fractions(
    classes: Sequence[str], fractions: Sequence[float], seed: int
) -> dict[str, list[str]]:
    """Deal classes out to train, val and test, the same way on every machine.

    Sizes are rounded by largest remainder, then each fraction above 0 gets the two classes that a
    task has at least.

    Raises:
        UserError: if the fractions are not three that add up to 1, or there are too few classes.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1):
        raise UserError(
            f"data.fractions={list(fractions)}: expected train, val and test, each 0..1, sum 1"
        )
    used = sum(f > 0 for f in fractions)
    if len(classes) < 2 * used:
        raise UserError(
            f"data.fractions={list(fractions)}: {used} splits need two classes each, but data.root "
            f"has only {len(classes)}"
        )
    exact = [f * len(classes) for f in fractions]
    # 1e-9: float error must neither add nor eat a class (0.7 * 10 is a little below 7).
    sizes = [math.floor(x + 1e-9) for x in exact]
    by_remainder = sorted(range(3), key=lambda i: round(sizes[i] - exact[i], 9))
    for i in by_remainder[: len(classes) - sum(sizes)]:
        sizes[i] += 1
    for i in range(3):
        while fractions[i] > 0 and sizes[i] < 2:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[i] += 1
    order = sorted(classes, key=lambda c: hashlib.sha256(f"{seed}/{c!a}".encode()).digest())
    first, second = sizes[0], sizes[0] + sizes[1]
    parts = (order[:first], order[first:second], order[second:])
    return {split: sorted(part) for split, part in zip(_SPLITS, parts, strict=True)}


def read_splits(file: Path, classes: Sequence[str]) -> dict[str, list[str]]:
    """Read a split file.

    Raises:
        UserError: if it is no such JSON, or names a class that is unknown or in it twice.
    """
    key = f"data.split_file={file}"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: cannot be read as JSON ({error})") from error
    if not isinstance(found, Mapping) or not all(_is_names(found.get(s, [])) for s in _SPLITS):
        raise UserError(
            f'{key}: expected {{"train": [CLASS, ...], "val": [...], "test": [...]}}, '
            "class names as strings"
        )
    splits = {split: list(found.get(split, [])) for split in _SPLITS}
    names = [name for split in _SPLITS for name in splits[split]]
    if not names:
        raise UserError(f"{key}: names no class; expected lists train, val and test")
    for name, count in Counter(names).items():
        if count > 1:
            where = [split for split in _SPLITS if name in splits[split]]
            raise UserError(f"{key}: class {name!r} is named {count} times ({', '.join(where)})")
    for name in names:
        if name not in classes:
            raise UserError(f"{key}: class {name!r} has no folder in data.root")
    return splits


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
