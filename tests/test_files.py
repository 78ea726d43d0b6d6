"""Image files of every kind, good and bad, in folders and zips."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.decode import decode_pool, upright
from pipeline.data.files import scan
from pipeline.data.pool import ImagePool
from pipeline.errors import UserError
from tests.image_files import picture, save, zip_up


def pool_of(root: Path, cache: Path, **options: Any) -> ImagePool:
    def fit(image: Image.Image) -> Image.Image:
        return upright(image, "RGB").resize((8, 8))

    return decode_pool(
        "toy",
        scan(root),
        lambda e: e.parts[-2],
        fit,
        (3, 8, 8),
        recipe={},
        cache_dir=cache,
        **options,
    )


def test_scan_lists_visible_images_of_folders_and_zips(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("b/ü 1.v2.PNG", "b/deep/x.jpeg", ".hidden/x.png", "b/.x.png", "b/._x.png"):
        save(root / name)
    (root / "b" / "notes.txt").write_text("no image")
    save(tmp_path / "zipped" / "a" / "y.webp")
    save(tmp_path / "zipped" / "__MACOSX" / "y.png")
    zip_up(tmp_path / "zipped", root / "some.ZIP")
    (root / "b" / "loop").symlink_to(root)
    found = scan(root)
    assert [e.parts for e in found] == [
        ("zipped", "a", "y.webp"),
        ("b", "deep", "x.jpeg"),
        ("b", "ü 1.v2.PNG"),
    ]
    assert [e.zipped for e in found] == [True, False, False]
    assert [e.parts for e in scan(root / "some.ZIP")] == [("zipped", "a", "y.webp")]


def test_a_damaged_zip_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=r"x\.zip: not a readable zip"):
        scan(tmp_path)


def test_decoded_once_until_a_file_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.decode._LONG", -1)  # even this takes long
    root, cache = tmp_path / "root", tmp_path / "cache"
    file = save(root / "a" / "1.bmp", picture(1))
    save(root / "b" / "1.png", picture(2))
    first = pool_of(root, cache)
    assert capsys.readouterr().err.splitlines()[0] == "decoding toy ..."
    assert np.array_equal(first.images[0].transpose(1, 2, 0), np.asarray(picture(1)))
    assert pool_of(root, cache).fingerprint == first.fingerprint
    assert capsys.readouterr().err == ""
    save(file, picture(3))  # a bitmap of the same size
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert np.array_equal(pool_of(root, cache).images[0].transpose(1, 2, 0), np.asarray(picture(3)))


def test_a_zip_may_move_without_being_decoded_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "tree" / "a" / "1.png")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        zip_up(tmp_path / "tree", tmp_path / name / "images.zip")
    pool_of(tmp_path / "one", tmp_path / "cache")
    capsys.readouterr()
    pool_of(tmp_path / "two", tmp_path / "cache")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_a_bad_image_is_named_or_skipped(
    damage: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    bad = save(root / "a" / f"1.{suffix}", picture(1, size=(64, 64)))
    data = bad.read_bytes()
    bad.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "text": b"hello"}[damage])
    save(root / "a" / "2.png", picture(2))
    save(root / "b" / "3.png", picture(3))
    with pytest.raises(UserError) as caught:
        pool_of(root, tmp_path / "cache", skip_bad=False)
    message = str(caught.value)
    assert message.startswith(f"{bad}: cannot be read as an image (")
    assert message.endswith("; data.skip_bad=true skips such files")
    assert ("0 bytes" in message) == (damage == "empty")
    assert "\n" not in message
    assert "0x" not in message
    assert list((tmp_path / "cache").iterdir()) == []
    capsys.readouterr()
    pool = pool_of(root, tmp_path / "cache", skip_bad=True)
    assert f"skipped 1 bad files, first {bad} (" in capsys.readouterr().err
    assert pool.labels.tolist() == [0, 1]
    for row, value in enumerate((2, 3)):
        assert np.array_equal(pool.images[row].transpose(1, 2, 0), np.asarray(picture(value)))


def test_skipping_may_not_empty_a_class(tmp_path: Path) -> None:
    save(tmp_path / "root" / "a" / "1.png")
    save(tmp_path / "root" / "b" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match="class 'b' has no readable image"):
        pool_of(tmp_path / "root", tmp_path / "cache", skip_bad=True)


def reopened(
    tmp_path: Path, name: str, image: Image.Image, mode: str, **options: Any
) -> np.ndarray:
    with Image.open(save(tmp_path / name, image, **options)) as opened:
        return np.asarray(upright(opened, mode))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_opaque_pictures_of_every_mode_keep_their_colours(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), "white").convert(mode)
    assert (reopened(tmp_path, "x.png", image, "RGB") == 255).all()
    assert reopened(tmp_path, "x.png", image, "L").shape == (4, 4)


def test_alpha_is_put_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert (reopened(tmp_path, "x.png", clear, "RGB") == 255).all()
    assert (reopened(tmp_path, "y.webp", clear, "RGB", lossless=True) == 255).all()
    half = Image.new("LA", (2, 2), (0, 51))  # a fifth of black on white
    assert (reopened(tmp_path, "z.png", half, "L") == 204).all()
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30])
    assert (reopened(tmp_path, "p.png", palette, "L", transparency=0) == 255).all()


def test_cmyk_and_16_bits_are_scaled(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = reopened(tmp_path, "x.jpg", cmyk, "RGB")[0, 0].astype(int)
    assert np.abs(red - [255, 0, 0]).max() <= 3
    deep = Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16))
    assert reopened(tmp_path, "x.png", deep, "L").tolist() == [[0, 100], [200, 255]]


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("L", (16, 8), 0)
    image.paste(255, (0, 0, 8, 8))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees: left goes up
    turned = reopened(tmp_path, "x.jpg", image, "L", exif=exif)
    assert turned.shape == (16, 8)
    assert turned[:7].min() > 250
    assert turned[9:].max() < 5
