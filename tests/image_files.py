"""Small image files, trees and zips for tests."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


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
