"""The contract of every data set of images in conf/data, met through its YAML alone."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from pipeline import config
from pipeline.compose import compose_config
from pipeline.data.pool import PROJECT, ImageSource
from pipeline.errors import UserError
from tests.image_files import cifar_tree, omniglot_set, picture, save

YAMLS = sorted((PROJECT / "conf/data").glob("*.yaml"))
NAMES = [path.stem for path in YAMLS if "base/images" in path.read_text()]


def folders(root: Path) -> list[str]:
    for i in range(18):
        save(root / f"class {i % 6}" / f"{i}.png", picture(i))
    return [f"data.root={root}", "data.image_size=16"]


def cifar(root: Path) -> list[str]:
    return [f"data.root={cifar_tree(root)}"]


def omniglot(root: Path) -> list[str]:
    omniglot_set(root, "images_background_small1", {"Greek": 2, "Early_Aramaic": 2}, False)
    omniglot_set(root, "images_background_small2", {"Greek": 2, "Tagalog": 2}, False)
    return [f"data.root={root}", "data.split=small1_to_small2"]


SMALL: dict[str, Callable[[Path], list[str]]] = {  # others load as their YAML has them, if they can
    "digits": lambda _: [],
    "glyphs": lambda _: [
        "data.n_train=6",
        "data.n_val=3",
        "data.n_test_kanji=2",
        "data.drawings=3",
    ],
    "image_folder": folders,
    "cifar_fs": cifar,
    "fc100": cifar,
    "omniglot": omniglot,
}


@pytest.fixture(params=NAMES)
def source(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ImageSource:
    monkeypatch.setattr("pipeline.data.pool.DATA_DIR", tmp_path / "data")
    monkeypatch.setattr("pipeline.data.cifar._refuse_partial", lambda *_: None)
    small = SMALL.get(request.param, lambda _: [])(tmp_path / "root")
    cfg = compose_config("train", [f"data={request.param}", *small])
    config.check(cfg)
    source = config.build_data(cfg.data).source
    try:
        source.load()
    except UserError as error:
        if request.param in SMALL:
            raise
        pytest.skip(f"its data is not here: {error}")
    return source


def test_images_labels_and_names_fit_together(source: ImageSource) -> None:
    pool = source.load().pool
    assert source.name
    assert pool.images.dtype == np.uint8
    assert pool.images.ndim == 4
    assert pool.images.shape[1] in (1, 3)
    assert len(pool.labels) == len(pool.images)
    assert len(set(pool.class_names)) == len(pool.class_names)
    assert set(pool.labels.tolist()) == set(range(len(pool.class_names)))  # no class is empty


def test_no_class_is_in_two_splits_and_all_are_there(source: ImageSource) -> None:
    pool, splits = source.load()
    assert set(splits) == {"train", "val", "test"}
    assert splits["test"]
    for one, other in combinations(splits.values(), 2):
        assert not set(one) & set(other)
    assert {name for names in splits.values() for name in names} <= set(pool.class_names)


def test_loaded_again_it_is_the_same(source: ImageSource) -> None:
    first, again = source.load(), source.load()
    assert first.pool.fingerprint == again.pool.fingerprint
    assert np.array_equal(first.pool.images, again.pool.images)
    assert {k: list(v) for k, v in first.splits.items()} == {
        k: list(v) for k, v in again.splits.items()
    }
