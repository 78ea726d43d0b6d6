"""Files that a visitor of the page uploads: read, then deleted. Floor 4."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from pipeline.data.photos import decode_bytes
from pipeline.errors import UserError


def read_uploads(
    paths: Sequence[str], shape: tuple[int, int, int], room: int
) -> tuple[list[np.ndarray], list[str]]:
    """Decode uploaded files and delete them, also those that are left out.

    Args:
        paths: of the files.
        shape: (C, S, S) of the images wanted.
        room: how many are taken.

    Returns:
        uint8 images and a line for each file that was left out.
    """
    channels, side, _ = shape
    images: list[np.ndarray] = []
    lines = []
    for path in map(Path, paths):
        try:
            if len(images) < room:
                images.append(decode_bytes(path.read_bytes(), channels, side))
        except (UserError, OSError) as error:
            lines.append(f"{path.name}: {getattr(error, 'strerror', None) or error}")
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # others lie in its folder
                path.parent.rmdir()
    if (over := len(paths) - len(lines) - len(images)) > 0:
        lines.append(f"{over} of {len(paths)} photos left out: there is room for {room} more")
    return images, lines


def first(lines: Sequence[str], many: int = 3) -> str:
    """The first of many lines, as one."""
    more = f"; and {len(lines) - many} more" if len(lines) > many else ""
    return "; ".join(lines[:many]) + more


def sweep(folder: Path, age: float) -> None:
    """Remove what has lain in a folder for `age` seconds: uploads that nothing asked for.

    Gradio also leaves an empty file there for each photo that it hands on.
    """
    before = time.time() - age
    for path, _, files in os.walk(folder, topdown=False):
        for file in (Path(path) / name for name in files):
            if _written(file) < before:
                file.unlink(missing_ok=True)
        if Path(path) != folder and not os.listdir(path) and _written(Path(path)) < before:
            Path(path).rmdir()


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another session was faster
        return float("inf")
