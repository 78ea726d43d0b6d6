"""Image files -> ImagePool: decoded in threads, upright, of one size and mode. Floor 1."""

import io
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from pipeline.data.files import Entry, check_bytes, digest, reader
from pipeline.data.pool import Allocate, ImagePool, cached_pool
from pipeline.errors import UserError

# Also what is often found under a wrong suffix, but no format that starts another program.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 100_000_000  # of one image
# Pillow itself would warn above 89 million, and refuse above twice that.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("error", Image.DecompressionBombWarning)
_CHUNK = 32  # images a thread decodes between two steps of the progress bar
_LONG = 3.0  # seconds after which a line says what is going on
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


def fit(image: Image.Image, channels: int, size: int) -> Image.Image:
    """What a learner sees of a photo: upright, its shorter side resized, its centre cropped.

    Args:
        image: just opened; a large JPEG is decoded at a fraction of its size.
        channels: 1 for grey, 3 for RGB.
        size: H = W.
    """
    image.draft(None, (2 * size, 2 * size))
    image = upright(image, "L" if channels == 1 else "RGB")
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


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
        UserError: naming the first file that is unreadable, truncated, empty or too large.
    """
    hint = "" if skip_bad is None else "; data.skip_bad=true skips such files"

    def refuse(i: int, why: str) -> UserError:
        return UserError(f"{entries[i]}: cannot be read as an image ({why}){hint}")

    bad = decode_each(out, entries, fit, name, None if skip_bad else refuse)
    kept = np.array([i for i in range(len(entries)) if i not in bad], dtype=np.int64)
    if bad:
        first, why = next(iter(bad.items()))
        print(
            f"warning: {name}: skipped {len(bad)} bad files, first {entries[first]} ({why})",
            file=sys.stderr,
        )
        for row, i in enumerate(kept):
            out[row] = out[i]
    return kept


def decode_each(
    out: np.ndarray,
    entries: Sequence[Entry],
    fit: Fit,
    name: str,
    refuse: Callable[[int, str], Exception] | None,
) -> dict[int, str]:
    """Decode each entry into its own row of `out`; else as `decode_into`.

    Args:
        out: see `decode_into`.
        entries: see `decode_into`.
        fit: see `decode_into`.
        name: see `decode_into`.
        refuse: from the index of an entry that cannot be read, and the reason, to the exception
            that stops at it; None leaves such rows as they are.

    Returns:
        The reason for each row that could not be filled, in the order of the rows.
    """
    Image.init()  # registers the formats; threads that open their first image would race in it
    tiny = sum(entry.size for entry in entries) < _TINY * len(entries)
    workers = 1 if tiny else os.cpu_count() or 1
    size = min(_CHUNK, -(-len(entries) // workers)) or 1
    with reader(entries) as read, ThreadPoolExecutor(workers) as threads:

        def decode(start: int) -> dict[int, str]:
            bad: dict[int, str] = {}
            for i in range(start, min(start + size, len(entries))):
                try:
                    out[i] = pixels(read(entries[i]), fit)
                except Exception as error:  # OSError, SyntaxError, struct.error, ... by decoder
                    bad[i] = reason(error)
                    if refuse:
                        raise refuse(i, bad[i]) from error
            return bad

        starts = range(0, len(entries), size)
        steps = progress(threads.map(decode, starts), f"decoding {name}", len(starts))
        return {i: why for bad in steps for i, why in bad.items()}


def pixels(data: bytes, fit: Fit) -> np.ndarray:
    """Decode one image file: (C, H, W) uint8.

    Raises:
        Exception: of a dozen kinds if it is damaged, empty, too large or of another format; see
            `reason`.
    """
    if not data:
        raise ValueError("the file is empty, 0 bytes")
    check_bytes(len(data))
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            check_pixels(*image.size)
            return planes(fit(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        found = re.search(r"\d+", str(error))
        check_pixels(int(found[0]) if found else MAX_PIXELS + 1, 1)
        raise
    except UnidentifiedImageError:
        raise ValueError(_other_format(data)) from None


def check_pixels(width: int, height: int) -> None:
    """Refuse an image whose pixels could fill the memory.

    Raises:
        ValueError: above `MAX_PIXELS`.
    """
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{width * height:,} pixels, more than the {MAX_PIXELS:,} that are decoded"
        )


def planes(image: Image.Image) -> np.ndarray:
    """The pixels of an "L" or "RGB" image: (C, H, W) uint8."""
    found = np.asarray(image)
    return found[None] if found.ndim == 2 else found.transpose(2, 0, 1)  # (C, H, W)


def reason(error: Exception) -> str:
    """Why an image could not be decoded, as a part of a line."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def _other_format(data: bytes) -> str:
    """What a file is that is none of `_FORMATS`: phones write HEIC, also under other suffixes."""
    text = "not a PNG, JPEG, WebP or BMP image"
    if data[4:8] == b"ftyp":
        kind = "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIC"
    elif data[:4] in (b"II*\0", b"MM\0*"):
        kind = "TIFF"
    else:
        return text
    return f"{text} but {kind}; convert it to JPEG"


def progress(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Pass items on, with a bar on stderr; where there is no terminal, lines if it is long."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, description, total, console=console)
        return
    started, told = time.monotonic(), False
    for item in items:
        if not told and time.monotonic() - started > _LONG:
            print(f"{description} ...", file=sys.stderr)
            told = True
        yield item
    if told:
        print(f"{description}: done in {time.monotonic() - started:.1f} s", file=sys.stderr)
