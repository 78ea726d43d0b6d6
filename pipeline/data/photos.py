"""A user's own photos: those that show the classes, and those to be classified. Floor 1."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.decode import check_pixels, decode_each, fit, pixels, planes, reason
from pipeline.data.files import SUFFIXES, Entry, tree
from pipeline.data.photo_list import LISTS, Listed, can_be_shown, class_name, read_list
from pipeline.errors import UserError

_READ = ", ".join(suffix[1:] for suffix in SUFFIXES)
_WANTED = (
    f"expected one folder a class with {_READ} files in it, or a CSV with the columns path and "
    "label"
)
_QUERIES = f"expected a folder with {_READ} files in it, one such file, or a CSV with a path column"
_PICTURES = (".heic", ".heif", ".avif", ".tif", ".tiff", ".gif", ".svg", ".jxl", ".jp2", ".dng")


class Photos(NamedTuple):
    """Photos that were read.

    Attributes:
        paths: as the user would recognise them; they open from the current folder.
        images: (n, C, H, W) uint8.
        labels: (n,) int64, index into `class_names`; None if not known.
        class_names: of the labels.
        bad: a line for each file that was left out, with its path and the reason; files of other
            suffixes share one.
    """

    paths: list[str]
    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    bad: list[str]


def read_support(source: Path, channels: int, image_size: int, skip_bad: bool) -> Photos:
    """Read labelled photos: `source/CLASS/`, at any depth, or the rows of a CSV.

    Args:
        source: a folder, whose hidden files are left out, or a CSV for `read_list`.
        channels: 1 for grey, 3 for RGB.
        image_size: H = W, see `fit`.
        skip_bad: leave out the photos that cannot be read, and name them in `bad`.

    Raises:
        UserError: unless there are two classes, each with a photo that can be read; for a bad
            photo that is not skipped; for a CSV that is not as `read_list` wants it.
    """
    source, key = source.expanduser(), f"support={source}"
    if _is_folder(source, key, _WANTED):
        listed = _class_folders(source, key)
    elif source.suffix.lower() in LISTS:
        listed = read_list(source, key, labelled=True)
    else:
        raise UserError(f"{key}: neither a folder nor a CSV; {_WANTED}")
    names = tuple(sorted(set(listed.labels or ())))
    if len(names) < 2:
        raise UserError(f"{key}: only one class, {names[0]!r}; two are needed at least; {_WANTED}")
    return _read(listed, names, channels, image_size, skip_bad, key)


def read_queries(
    source: Path, channels: int, image_size: int, skip_bad: bool, known: Sequence[str] = ()
) -> Photos:
    """Read photos to be classified: of a folder, at any depth, one file, or the rows of a CSV.

    Args:
        source: see `read_support`; a CSV needs no column for the class.
        channels: see `read_support`.
        image_size: see `read_support`.
        skip_bad: see `read_support`.
        known: class names. If each photo of a folder lies below one of these names, or the CSV has
            a column for the class, the labels are known.

    Raises:
        UserError: if there is no photo that can be read; else see `read_support`.
    """
    source, key = source.expanduser(), f"query={source}"
    if _is_folder(source, key, _QUERIES):
        listed = _any_depth(source, key, known)
    elif source.suffix.lower() in LISTS:
        listed = read_list(source, key, labelled=False, known=known)
    else:
        listed = Listed([Entry(source.name, source.stat().st_size, 0, source.parent, False)])
    if not known:
        listed = listed._replace(labels=None)
    return _read(listed, tuple(known), channels, image_size, skip_bad, key)


def decode_bytes(data: bytes, channels: int, size: int) -> np.ndarray:
    """Decode an image file that is in memory, as `read_queries` would: (C, S, S) uint8.

    Raises:
        UserError: if it cannot be read.
    """
    with _readable():
        return pixels(data, partial(fit, channels=channels, size=size))


def from_pil(image: Image.Image, channels: int, size: int) -> np.ndarray:
    """Fit an opened image: (C, S, S) uint8. It is left as it is.

    Raises:
        UserError: if it is too large, damaged or empty.
    """
    with _readable():
        check_pixels(*image.size)
        return planes(fit(image.copy(), channels, size))


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # OSError, SyntaxError, struct.error, ... by decoder
        raise UserError(f"the image cannot be read ({reason(error)})") from error


def from_array(image: np.ndarray, channels: int, size: int) -> np.ndarray:
    """Fit an image of numbers: (H, W), (H, W, 3) or (H, W, 4) uint8 -> (C, S, S) uint8.

    Raises:
        UserError: if it is of another shape or type, too large or empty.
    """
    shaped = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
    if image.dtype != np.uint8 or not shaped or not image.size:
        raise UserError(
            f"the image is {image.dtype} {image.shape}; expected uint8 (H, W), (H, W, 3) or "
            "(H, W, 4)"
        )
    return from_pil(Image.fromarray(np.ascontiguousarray(image)), channels, size)


def _is_folder(source: Path, key: str, wanted: str) -> bool:
    if not os.path.exists(source):  # Path.exists raises where a folder above may not be read
        raise UserError(f"{key}: not found; {wanted}")
    return source.is_dir()


def _class_folders(source: Path, key: str) -> Listed:
    found, others, left_out = _images(source)
    try:
        names = {class_name(p.name) for p in source.iterdir() if p.is_dir() and p.name[0] != "."}
    except OSError as error:
        raise UserError(f"{key}: cannot be read ({error.strerror})") from error
    if not names:
        raise UserError(f"{key}: no folder of a class in it (images: {len(found)}); {_WANTED}")
    entries = [e for e in found if len(e.parts) > 1]
    labels = [class_name(e.parts[0]) for e in entries]
    for name in sorted(names - set(labels)):
        mine = [e for e in others if class_name(e.parts[0]) == name]
        raise UserError(f"{key}: class {name!r} holds no image{_other_suffixes(mine)}; {_WANTED}")
    left_out += [f"{_path(e)}: in no folder of a class" for e in found if len(e.parts) == 1]
    return Listed(entries, labels, left_out=left_out)


def _any_depth(source: Path, key: str, known: Sequence[str]) -> Listed:
    found, others, left_out = _images(source)
    if not found:
        raise UserError(f"{key}: no image in it{_other_suffixes(others)}; {_QUERIES}")
    folders = [class_name(e.parts[0]) if len(e.parts) > 1 else "" for e in found]
    return Listed(found, folders if set(folders) <= set(known) else None, left_out=left_out)


def _images(source: Path) -> tuple[list[Entry], list[Entry], list[str]]:
    """The images of a folder tree, its other files, and what is to be said of these."""
    files, lines = [], []
    for entry in tree(source):
        if can_be_shown(entry.member):
            files.append(entry)
        else:
            lines.append(f"{_path(entry)!a}: its name holds signs that cannot be shown; rename it")
    found = [entry for entry in files if entry.suffix in SUFFIXES]
    others = [entry for entry in files if entry.suffix not in SUFFIXES]
    if others:
        lines.append(f"{source}{_other_suffixes(others)}")
    return found, others, lines


def _other_suffixes(files: Sequence[Entry]) -> str:
    """What is said of files that are left out for their suffix; nothing if there are none."""
    if not files:
        return ""
    counts = Counter(e.suffix or "without one" for e in files).most_common()
    named = ", ".join(f"{n} {name}{_convert(name)}" for name, n in counts)
    return f": left out for their suffix: {named}; {_READ} are read"


def _convert(suffix: str) -> str:
    return " - convert them to JPEG" if suffix in _PICTURES else ""


def _path(entry: Entry) -> str:
    return str(entry.container / entry.member)


def _read(
    listed: Listed, names: tuple[str, ...], channels: int, size: int, skip_bad: bool, key: str
) -> Photos:
    """Decode what was found.

    Raises:
        UserError: if a photo is bad and not skipped, or nothing is left: of all, or of a class of
            the support photos.
    """
    entries, labels = listed.entries, listed.labels
    what = key.partition("=")[0]

    def line(i: int, why: str) -> str:
        row = f" (row {listed.rows[i]})" if listed.rows else ""
        return f"{_path(entries[i])}{row}: {why}"

    def refuse(i: int, why: str) -> UserError:
        return UserError(f"{what}: {line(i, why)}; skip_bad=true leaves such photos out")

    images = np.empty((len(entries), channels, size, size), dtype=np.uint8)
    bad = decode_each(
        images,
        entries,
        partial(fit, channels=channels, size=size),
        f"{what} photos",
        None if skip_bad else refuse,
    )
    kept = [i for i in range(len(entries)) if i not in bad]
    left = {labels[i] for i in kept} if labels else set()
    for i, why in bad.items():
        if not kept or (what == "support" and labels and labels[i] not in left):
            of = f"class {labels[i]!r} has" if labels else "there is"
            raise UserError(f"{key}: {of} no photo that can be read; first {line(i, why)}")
    return Photos(
        [_path(entries[i]) for i in kept],
        images[kept] if bad else images,
        None if labels is None else np.array([names.index(labels[i]) for i in kept], np.int64),
        names if labels is not None else (),
        [*listed.left_out, *(line(i, why) for i, why in bad.items())],
    )
