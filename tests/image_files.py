"""Small image files, trees and zips for tests."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.pool import PROJECT


def picture(value: int = 0, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def zip_up(folder: Path, file: Path) -> Path:
    """Zip a folder with its own name as the first part of the paths."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent).as_posix())
    return file


def omniglot_set(root: Path, name: str, alphabets: dict[str, int], zipped: bool) -> None:
    """One image a character, in folders or a zip beside half of them."""
    for alphabet, characters in alphabets.items():
        for i in range(1, characters + 1):
            image = Image.new("1", (105, 105), 1)
            image.paste(0, (0, 0, 105, 40))  # a bar of ink at the top
            save(root / name / alphabet / f"character{i:02d}" / "0001_01.png", image)
    if zipped:
        zip_up(root / name, root / f"{name}.zip")
        (root / name / next(iter(alphabets))).rename(root / f"{name} moved")  # half unpacked


def cifar_tree(root: Path, suffix: str = "png") -> Path:
    """One image a class of CIFAR-100."""
    listed = json.loads((PROJECT / "pipeline/data/splits/fc100.json").read_text())
    for split in ("train", "val", "test"):
        for name in listed[split]:
            save(root / name / f"1.{suffix}", picture(size=(32, 32)))
    return root
