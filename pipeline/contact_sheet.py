"""Photos with what a classifier says of them, on one page. Floor 4."""

import io
import os
from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.calibration import wilson_interval
from pipeline.data.decode import decode_each, fit
from pipeline.data.files import Entry
from pipeline.data.photos import Photos, from_array
from pipeline.html import render

_SIDE, _SMALL = 160, 96  # pixels of a thumbnail; of one among many, and of a support photo
_MANY = 500


class Shown(NamedTuple):
    """A photo that was classified.

    Attributes:
        path: of its file, shown and, if it can be read, the source of the thumbnail.
        image: (C, S, S) uint8, what the learner saw; the thumbnail where there is no file.
        predicted: class name.
        confidence: 0..1.
        rejected: whether it looks like none of the classes.
        true: class name, if it is known.
    """

    path: str
    image: np.ndarray
    predicted: str
    confidence: float
    rejected: bool
    true: str | None = None

    @property
    def right(self) -> bool:
        """Whether the true class was predicted."""
        return self.predicted == self.true


def contact_sheet(
    rows: Sequence[Shown], title: str, notes: Sequence[str], support: Photos | None = None
) -> str:
    """Lay out photos on a page, those that need a look first: rejected, then least confident.

    The page runs no script and loads nothing, and its own policy forbids both, so no name of a
    file or a class can make it. Thumbnails show the square that the learner saw, without the
    data that cameras add (time, place).

    Args:
        rows: the photos.
        title: of the page.
        notes: lines below it.
        support: the photos that the classifier was made from, for a section at the end.

    Returns:
        A document in HTML. It holds signs beyond ASCII: write it as UTF-8.
    """
    rows = sorted(rows, key=lambda row: (not row.rejected, row.confidence, row.path))
    found = {name for row in rows for name in (row.predicted, row.true) if name is not None}
    given = support.class_names if support else ()
    names = [*given, *sorted(found - set(given))]
    side = _SMALL if len(rows) > _MANY else _SIDE
    return render(
        "contact_sheet.html",
        {"percent": percent},
        title=title,
        notes=notes,
        rows=rows,
        pictures=_thumbnails([r.path for r in rows], [r.image for r in rows], side),
        names=names,
        classes=[_about_class(name, rows, support) for name in names],
        summary=_summary(rows),
        support=_support(support) if support else [],
    )


def percent(share: float) -> str:
    """A share as a whole percentage that says 100 or 0 only if it is so."""
    rounded = round(100 * share)
    if rounded == 100 and share < 1:
        return "> 99 %"
    return "< 1 %" if rounded == 0 and share > 0 else f"{rounded} %"


def _summary(rows: Sequence[Shown]) -> list[tuple[str, str, str]]:
    """Figures of all photos: the figure, what it is, and how it is to be read."""
    rejected = sum(row.rejected for row in rows)
    figures = [
        (f"{len(rows):,}", "photos", ""),
        (f"{rejected:,}", "look like none of the classes", percent(rejected / max(1, len(rows)))),
    ]
    known = [row for row in rows if row.true is not None]
    accepted = [row for row in known if not row.rejected]
    for which, what in ((known, "right"), (accepted, "right among the rest")):
        if which and (which is known or len(accepted) < len(known)):
            right = sum(row.right for row in which)
            low, high = (100 * bound for bound in wilson_interval(right, len(which)))
            interval = f"{right:,} of {len(which):,}; 95 % interval {low:.0f} to {high:.0f} %"
            figures.append((percent(right / len(which)), what, interval))
    return figures


def _about_class(name: str, rows: Sequence[Shown], support: Photos | None) -> dict[str, object]:
    predicted = [row for row in rows if row.predicted == name]
    true = [row for row in rows if row.true == name]
    given = 0
    if support is not None and support.labels is not None and name in support.class_names:
        given = int((support.labels == support.class_names.index(name)).sum())
    return {
        "name": name,
        "support": given,
        "predicted": len(predicted),
        "rejected": sum(row.rejected for row in predicted),
        "true": len(true),
        "found": sum(row.right for row in true),
    }


def _support(support: Photos) -> list[tuple[str, list[tuple[str, str]]]]:
    """Name of each class with the path and the thumbnail of each of its photos."""
    assert support.labels is not None
    pictures = _thumbnails(support.paths, support.images, _SMALL)
    shown = list(zip(support.paths, pictures, strict=True))
    return [
        (name, [shown[i] for i in np.flatnonzero(support.labels == label)])
        for label, name in enumerate(support.class_names)
    ]


def _thumbnails(
    paths: Sequence[str], images: Sequence[np.ndarray] | np.ndarray, side: int
) -> list[str]:
    """Addresses that hold a JPEG each: of the file, or of what the learner saw of it."""
    if not paths:
        return []
    channels = len(images[0])
    entries = [
        Entry(p, os.path.getsize(p) if os.path.isfile(p) else 0, 0, Path(), False) for p in paths
    ]
    out = np.empty((len(paths), channels, side, side), dtype=np.uint8)
    small = partial(fit, channels=channels, size=side)
    for i in decode_each(out, entries, small, "thumbnails", None):
        out[i] = _resized(images[i], side)
    return [_jpeg(image) for image in out]


def thumbnail(image: np.ndarray, side: int) -> str:
    """Address that holds a JPEG of an image (C, S, S) uint8, `side` pixels wide and high."""
    return _jpeg(_resized(image, side))


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)  # (H, W, C)
    return from_array(pixels, len(image), side)


def _jpeg(image: np.ndarray) -> str:
    file = io.BytesIO()
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)  # (H, W, C)
    Image.fromarray(pixels).save(file, format="JPEG", quality=78, optimize=True)
    return f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"
