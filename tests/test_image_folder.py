"""Image folders: classes, splits, and what is refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.data.image_folder import ImageFolder, split_by_fractions
from pipeline.errors import UserError
from tests.image_files import picture, save


def folder(root: Path, **options: Any) -> ImageFolder:
    defaults: dict[str, Any] = {
        "image_size": 8, "channels": 3, "fractions": [0.6, 0.2, 0.2], "split_seed": 0,
        "split_file": None, "skip_bad": False, "cache_dir": str(root.parent / "cache"),
    }  # fmt: skip
    return ImageFolder(root=str(root), **(defaults | options))


@pytest.fixture
def six_classes(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for i, name in enumerate(["a b", "ä", "c.d", "E", "f", "g"]):
        save(root / name / "1.png", picture(i, size=(20, 10)))
        save(root / name / "inner" / "2.JPG", picture(i))
    save(root / "loose.png")
    return root


def test_image_folder_loads_classes_of_any_depth_and_name(six_classes: Path) -> None:
    pool, splits = folder(six_classes).load()
    assert pool.images.shape == (12, 3, 8, 8)
    assert set(pool.class_names) == {"a b", "ä", "c.d", "E", "f", "g"}
    assert set(Counter(pool.labels.tolist()).values()) == {2}
    assert [len(splits[s]) for s in ("train", "val", "test")] == [2, 2, 2]
    assert folder(six_classes, channels=1).load().pool.image_shape == (1, 8, 8)


def test_the_shorter_side_fits_and_the_centre_is_cropped(tmp_path: Path) -> None:
    wide = Image.new("L", (32, 8), 0)
    wide.paste(255, (12, 0, 20, 8))  # the centre square
    for name in "ab":
        save(tmp_path / "root" / name / "1.png", wide)
    pool, splits = folder(tmp_path / "root", channels=1, fractions=[1.0, 0.0, 0.0]).load()
    assert (pool.images == 255).all()
    assert splits == {"train": ["a", "b"], "val": [], "test": []}


@pytest.mark.parametrize(
    ("n", "fractions", "sizes"),
    [
        (8, [0.6, 0.2, 0.2], [4, 2, 2]),
        (6, [0.9, 0.05, 0.05], [2, 2, 2]),
        (10, [0.7, 0.1, 0.2], [6, 2, 2]),
        (10, [0.98, 0.01, 0.01], [6, 2, 2]),
        (7, [0.5, 0.0, 0.5], [4, 0, 3]),
        (4, [0.0, 0.0, 1.0], [0, 0, 4]),
    ],
)
def test_fractions(n: int, fractions: list[float], sizes: list[int]) -> None:
    classes = [f"class{i}" for i in range(n)]
    splits = split_by_fractions(classes, fractions, seed=3)
    assert [len(splits[s]) for s in ("train", "val", "test")] == sizes
    assert sorted(name for names in splits.values() for name in names) == sorted(classes)
    assert splits == split_by_fractions(classes[::-1], fractions, seed=3)


def test_the_split_seed_matters() -> None:
    classes = [f"class{i}" for i in range(20)]
    dealt = {str(split_by_fractions(classes, [0.6, 0.2, 0.2], seed)) for seed in range(5)}
    assert len(dealt) == 5


@pytest.mark.parametrize("fractions", [[0.5, 0.5], [0.5, 0.6, -0.1], [0.5, 0.2, 0.2]])
def test_bad_fractions_are_refused(fractions: list[float], six_classes: Path) -> None:
    with pytest.raises(UserError, match=r"data\.fractions=.*expected"):
        folder(six_classes, fractions=fractions).load()


def test_too_few_classes_for_the_fractions(tmp_path: Path) -> None:
    save(tmp_path / "root" / "a" / "1.png")
    with pytest.raises(UserError, match=r"3 splits need two classes each.*has only 1"):
        folder(tmp_path / "root").load()


def test_a_split_file_decides(six_classes: Path, tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"train": ["f", "ä"], "test": ["E"]}))
    pool, splits = folder(six_classes, split_file=str(file)).load()
    assert splits == {"train": ["f", "ä"], "val": [], "test": ["E"]}
    assert set(pool.class_names) == {"f", "ä", "E"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train": ["f"], "test": ["f"]}', r"class 'f' is named 2 times \(train, test\)"),
        ('{"train": ["nope"]}', "class 'nope' has no folder"),
        ('{"train": "f"}', "expected"),
        ("[]", "expected"),
        ("{}", "names no class"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_bad_split_files(text: str, message: str, six_classes: Path, tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"data\.split_file=.*{message}"):
        folder(six_classes, split_file=str(file)).load()
    with pytest.raises(UserError, match="cannot be read as JSON"):
        folder(six_classes, split_file=str(tmp_path / "absent.json")).load()


def test_folders_that_are_no_image_folder(six_classes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root=.*absent: not found; expected one folder"):
        folder(tmp_path / "absent").load()
    with pytest.raises(UserError, match="not a folder"):
        folder(six_classes / "loose.png").load()
    with pytest.raises(UserError, match="no class folders"):
        folder(six_classes / "f" / "inner").load()
    (six_classes / "vacant").mkdir()
    (six_classes / "vacant" / "notes.txt").write_text("")
    with pytest.raises(UserError, match="class folder 'vacant' holds no image"):
        folder(six_classes).load()
