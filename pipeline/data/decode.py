"""Image files -> ImagePool: decoded in threads, upright, of one size and mode. Floor 1."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

from pipeline.data.files import Entry, digest, reader
from pipeline.data.pool import Allocate, ImagePool, cached_pool
from pipeline.errors import UserError

# Also what is often found under a wrong suffix, but no format that starts another program.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
_CHUNK = 32  # images a thread decodes between two steps of the progress bar
_TINY = 3000  # bytes; mean size below which threads spend their time waiting for the interpreter

Fit = Callable[[Image.Image], Image.Image]
"""Turns an opened image into one of the pool's size and mode ("L" or "RGB")."""
T = TypeVar("T")


def upright(image: Image.Image, mode: str) -> Image.Image:
    """Apply the EXIF rotation, put transparent images on white, convert to "L" or "RGB"."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits: `convert` would clip at 255 instead of scaling
        levels = np.asarray(image).clip(0, 65535).astype(np.float32) / 257
        image = Image.fromarray(levels.round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def decode_pool(
    name: str,
    entries: Sequence[Entry],
    class_of: Callable[[Entry], str],
    fit: Fit,
    shape: tuple[int, int, int],
    *,
    recipe: Mapping[str, object],
    skip_bad: bool | None = None,
    cache_dir: Path | None = None,
) -> ImagePool:
    """Decode all entries into a cached pool, or open the cache if no file has changed.

    Args:
        name: of the data set.
        entries: the images, from `scan`.
        class_of: class name of an entry.
        fit: makes the pool's image out of an opened one.
        shape: (C, H, W) of the pool's images.
        recipe: what `fit` depends on.
        skip_bad: see `decode_into`.
        cache_dir: see `cached_pool`.

    Raises:
        UserError: see `decode_into`; or if skipping leaves a class without an image.
    """

    def build(allocate: Allocate) -> tuple[np.ndarray, list[str]]:
        labels, names = label(entries, class_of)
        images = allocate(len(entries), *shape)
        labels = labels[decode_into(images, entries, fit, name, skip_bad)]
        for i in sorted(set(range(len(names))) - set(labels.tolist())):
            raise UserError(f"{name}: class {names[i]!r} has no readable image")
        return labels, names

    recipe = {**recipe, "shape": shape, "skip_bad": bool(skip_bad), "files": digest(entries)}
    return cached_pool(name, recipe, build, cache_dir)


def label(
    entries: Iterable[Entry], class_of: Callable[[Entry], str]
) -> tuple[np.ndarray, list[str]]:
    """Labels (n,) int64 of the entries, and the sorted class names they index."""
    classes = [class_of(entry) for entry in entries]
    names = sorted(set(classes))
    ids = {name: i for i, name in enumerate(names)}
    return np.array([ids[c] for c in classes], dtype=np.int64), names


def decode_into(
    out: np.ndarray, entries: Sequence[Entry], fit: Fit, name: str, skip_bad: bool | None = None
) -> np.ndarray:
    """Decode entries in threads, straight into an array that may be larger than memory.

    Args:
        out: (n, C, H, W) uint8, n at least the number of entries; filled from the first row.
        entries: the images.
        fit: see `Fit`.
        name: of the data set, for the progress bar.
        skip_bad: leave out the files that cannot be read, with a line on stderr; None: the
            source has no such option, so the error does not speak of it.

    Returns:
        (m,) int64, the index of the entry in each of the first m rows.

    Raises:
        UserError: naming the first file that is unreadable, truncated or empty.
    """
    hint = "" if skip_bad is None else "; data.skip_bad=true skips such files"
    Image.init()  # registers the formats; threads that open their first image would race in it
    tiny = sum(entry.size for entry in entries) < _TINY * len(entries)
    workers = 1 if tiny else os.cpu_count()
    with reader(entries) as read, ThreadPoolExecutor(workers) as threads:

        def decode(start: int) -> list[tuple[int, str]]:
            bad: list[tuple[int, str]] = []
            for i in range(start, min(start + _CHUNK, len(entries))):
                try:
                    out[i] = _pixels(read(entries[i]), fit)
                except Exception as error:  # decoders raise a dozen kinds on damaged files
                    if not skip_bad:
                        raise UserError(
                            f"{entries[i]}: cannot be read as an image ({_reason(error)}){hint}"
                        ) from error
                    bad.append((i, f"{entries[i]} ({_reason(error)})"))
            return bad

        chunks = threads.map(decode, range(0, len(entries), _CHUNK))
        steps = progress(chunks, f"decoding {name}", -(-len(entries) // _CHUNK))
        bad = dict(item for chunk in steps for item in chunk)
    return _close_gaps(out, len(entries), bad, name)


def _close_gaps(out: np.ndarray, n: int, bad: Mapping[int, str], name: str) -> np.ndarray:
    kept = np.array([i for i in range(n) if i not in bad], dtype=np.int64)
    if bad:
        first = next(iter(bad.values()))
        print(f"warning: {name}: skipped {len(bad)} bad files, first {first}", file=sys.stderr)
        for row, i in enumerate(kept):
            out[row] = out[i]
    return kept


def _pixels(data: bytes, fit: Fit) -> np.ndarray:
    if not data:
        raise ValueError("the file is empty, 0 bytes")
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        pixels = np.asarray(fit(image))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # (C, H, W)


def _reason(error: Exception) -> str:
    text = str(error)
    if "cannot identify image file" in text:  # Pillow goes on with a memory address
        return "not a PNG, JPEG, WebP or BMP image"
    return " ".join(text.split()) or type(error).__name__


def progress(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Pass items on, with a bar on stderr; two plain lines where that is no terminal."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, description, total, console=console)
        return
    print(f"{description} ...", file=sys.stderr)
    started = time.monotonic()
    yield from items
    print(f"{description}: done in {time.monotonic() - started:.1f} s", file=sys.stderr)
