"""Omniglot and CIFAR: on small made trees and zips, and on real data."""

import json
import urllib.error
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline.data import omniglot as omniglot_module
from pipeline.data.cifar import Cifar
from pipeline.data.files import scan
from pipeline.data.omniglot import Omniglot
from pipeline.data.pool import PROJECT
from pipeline.errors import UserError
from tests.image_files import cifar_tree, omniglot_set, picture, save, zip_up

REAL = PROJECT.parent / "shared" / "data"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data: {REAL} is absent")


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-100 with an image or so a class."""
    monkeypatch.setattr("pipeline.data.cifar._refuse_partial", lambda *_: None)


# --- Omniglot


@pytest.mark.parametrize("zipped", [False, True])
def test_omniglot_small1_to_small2(zipped: bool, tmp_path: Path) -> None:
    omniglot_set(tmp_path, "images_background_small1", {"Greek": 2, "Early_Aramaic": 1}, zipped)
    omniglot_set(tmp_path, "images_background_small2", {"Greek": 2, "Tagalog": 1}, zipped)
    source = Omniglot(str(tmp_path), "small1_to_small2", 28, True, str(tmp_path / "cache"))
    pool, splits = source.load()
    turned = [f"Greek/character0{i}@{a}" for a in (90, 180, 270) for i in (1, 2)]
    assert splits == {
        "train": ["Greek/character01", "Greek/character02", *turned],
        "val": ["Early_Aramaic/character01"],
        "test": ["Tagalog/character01"],
    }
    assert pool.images.shape == (10, 1, 28, 28)
    rows = {pool.class_names[c]: pool.images[i, 0] for i, c in enumerate(pool.labels)}
    upright_image = rows["Greek/character01"]
    assert upright_image[:9].min() > 240  # ink is bright
    assert upright_image[13:].max() == 0
    for quarters in (1, 2, 3):
        turned_image = rows[f"Greek/character01@{90 * quarters}"]
        assert np.array_equal(turned_image, np.rot90(upright_image, quarters))


def test_omniglot_minimal_and_without_rotations(tmp_path: Path) -> None:
    root = tmp_path / "omniglot-py"  # where torchvision keeps it
    omniglot_set(root, "images_background_small2", {"Greek": 1, "Latin": 2}, False)
    omniglot_set(root, "images_evaluation", {"Angelic": 3}, False)
    cache = str(tmp_path / "cache")
    pool, splits = Omniglot(str(tmp_path), "minimal2", 14, False, cache).load()
    assert [len(splits[s]) for s in ("train", "val", "test")] == [2, 1, 3]
    assert pool.images.shape == (6, 1, 14, 14)


def test_omniglot_missing_or_incomplete(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Omniglot(str(tmp_path), "vinyals", 28, False).load()
    for part in (
        f"data.root={tmp_path}",
        "images_background.zip",
        "github.com/brendenlake/omniglot",
    ):
        assert part in str(caught.value)
    omniglot_set(tmp_path, "images_background", {"Greek": 24}, False)
    omniglot_set(tmp_path, "images_evaluation", {"Angelic": 20}, False)
    with pytest.raises(UserError, match=r"no images of 1579 characters .*incomplete"):
        Omniglot(str(tmp_path), "vinyals", 28, False).load()


def test_omniglot_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omniglot_module, "DATA_DIR", tmp_path)
    made = tmp_path / "made"
    omniglot_set(made, "images_background_small1", {"Greek": 1, "Early_Aramaic": 1}, True)
    omniglot_set(made / "2", "images_background_small2", {"Tagalog": 1}, True)

    def fetch(url: str, root: str, md5: str | None) -> None:
        name = url.rsplit("/", 1)[1]
        next(made.rglob(name)).rename(Path(root) / name)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    source = Omniglot(None, "small1_to_small2", 28, False, str(tmp_path / "cache"))
    assert source.load().splits["test"] == ["Tagalog/character01"]
    assert len(list((tmp_path / "omniglot").iterdir())) == 2

    def fail(url: str, root: str, md5: str | None) -> None:
        (Path(root) / "half").write_text("")
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)
    with pytest.raises(UserError, match=r"data\.root=null: download of .*no network.*data\.root"):
        Omniglot(None, "vinyals", 28, False).load()
    assert len(list((tmp_path / "omniglot").iterdir())) == 2


def test_the_published_omniglot_split_has_its_sizes() -> None:
    splits = omniglot_module._vinyals()
    assert [len(set(splits[s])) for s in ("train", "val", "test")] == [1028, 172, 423]
    assert len({name for names in splits.values() for name in names}) == 1623


@real_data
def test_real_omniglot(tmp_path: Path) -> None:
    root = REAL / "omniglot"
    assert [len({e.parts[:-1] for e in scan(file)}) for file in sorted(root.glob("*.zip"))] == [
        136,
        156,
    ]
    source = Omniglot(str(root), "small1_to_small2", 28, True, str(tmp_path))
    pool, splits = source.load()
    assert [len(splits[s]) for s in ("train", "val", "test")] == [114 * 4, 22, 106]
    assert Counter(pool.labels.tolist()) == dict.fromkeys(range(584), 20)
    assert 5 < pool.images.mean() < 50  # ink is bright on dark
    assert pool.images.max() == 255


# --- CIFAR


@pytest.mark.usefixtures("few_images")
def test_cifar_splits_share_a_cache_and_cover_all_classes(tmp_path: Path) -> None:
    root, cache = cifar_tree(tmp_path / "root"), str(tmp_path / "cache")
    save(root / "of no class" / "1.png")
    pools = []
    for name, sizes in (("cifar_fs", [64, 16, 20]), ("fc100", [60, 20, 20])):
        source = Cifar(name, str(root), cache)  # type: ignore[arg-type]  # a literal in a loop
        pool, splits = source.load()
        assert source.name == name
        assert [len(splits[s]) for s in ("train", "val", "test")] == sizes
        assert sorted(c for names in splits.values() for c in names) == list(pool.class_names)
        pools.append(pool)
    assert pools[0].images.shape == (100, 3, 32, 32)
    assert pools[0].fingerprint == pools[1].fingerprint
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.usefixtures("few_images")
def test_cifar_unpacked_beside_its_zips_counts_once(tmp_path: Path) -> None:
    root = cifar_tree(tmp_path / "cifar100")
    zip_up(root, root / "all.zip")
    assert len(Cifar("fc100", str(root), str(tmp_path / "cache")).load().pool.labels) == 100


def test_cifar_missing_classes_and_wrong_sizes(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    with pytest.raises(UserError, match=r"data\.root=.*absent: not found; expected folders"):
        Cifar("fc100", str(tmp_path / "absent"), cache).load()
    save(tmp_path / "other" / "x" / "1.png")
    with pytest.raises(UserError, match="no image of a CIFAR-100 class"):
        Cifar("fc100", str(tmp_path / "other"), cache).load()
    file = save(tmp_path / "root" / "apple" / "1.png", picture(size=(32, 32)))
    with pytest.raises(UserError, match="no images of 99 of the 100 classes of fc100: aquarium"):
        Cifar("fc100", str(tmp_path / "root"), cache).load()
    save(file, picture(size=(33, 32)))
    with pytest.raises(UserError, match=r"1\.png: .*33x32 pixels; CIFAR-100's are 32x32\)$"):
        Cifar("fc100", str(tmp_path / "root"), cache).load()


@pytest.mark.usefixtures("few_images")
def test_cifar_from_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = json.loads((PROJECT / "pipeline/data/splits/fc100.json").read_text())
    classes = sorted(c for s in ("train", "val", "test") for c in listed[s])
    for name in ("train", "test", "meta"):
        (tmp_path / "cifar-100-python").mkdir(exist_ok=True)
        (tmp_path / "cifar-100-python" / name).write_text("")

    def fake(root: str, train: bool, download: bool) -> SimpleNamespace:
        assert not download  # the user's own folder is not written to
        data = np.full((100, 32, 32, 3), 10 + train, np.uint8)
        return SimpleNamespace(data=data, targets=list(range(100)), classes=classes)

    monkeypatch.setattr("torchvision.datasets.CIFAR100", fake)
    pool, _ = Cifar("cifar_fs", str(tmp_path), str(tmp_path / "cache")).load()
    assert pool.images.shape == (200, 3, 32, 32)
    assert pool.images[[0, 100], 0, 0, 0].tolist() == [11, 10]
    assert Counter(pool.labels.tolist()) == dict.fromkeys(range(100), 2)


def test_cifar_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: str, train: bool, download: bool) -> None:
        assert download
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR100", fail)
    monkeypatch.setattr("pipeline.data.cifar.DATA_DIR", tmp_path)
    with pytest.raises(UserError, match=r"download of https://.*no network.*data\.root") as caught:
        Cifar("fc100", None, str(tmp_path / "cache")).load()
    assert "\n" not in str(caught.value)


@real_data
@pytest.mark.usefixtures("few_images")
def test_real_cifar(tmp_path: Path) -> None:
    root = tmp_path / "cifar100"
    for file in sorted((REAL / "cifar100").glob("*.zip")):
        with zipfile.ZipFile(file) as archive:
            archive.extractall(tmp_path, archive.namelist()[::200])
    pool, _ = Cifar("cifar_fs", str(root), str(tmp_path / "cache")).load()
    assert Counter(pool.labels.tolist()) == dict.fromkeys(range(100), 3)
    first = next(iter(scan(root)))
    with Image.open(root / first.member) as image:
        assert np.array_equal(pool.images[0].transpose(1, 2, 0), np.asarray(image))
