"""A user's photos: folders, lists and single images, good and bad."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import decode
from pipeline.data.files import MAX_BYTES
from pipeline.data.image_folder import ImageFolder
from pipeline.data.photos import (
    Photos,
    decode_bytes,
    from_array,
    from_pil,
    read_queries,
    read_support,
)
from pipeline.errors import UserError
from tests.image_files import picture, save


def png(width: int, height: int) -> bytes:
    """A file of a few dozen bytes that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(99))), chunk(b"IEND", b"")]
    )


def support(source: Path, skip_bad: bool = True, channels: int = 3, size: int = 8) -> Photos:
    return read_support(source, channels, size, skip_bad)


def queries(source: Path, skip_bad: bool = True, known: tuple[str, ...] = ()) -> Photos:
    return read_queries(source, 3, 8, skip_bad, known)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Three photos of a cat, one of a dog."""
    root = tmp_path / "pets"
    for i, name in enumerate(["cat/1.png", "cat/2.bmp", "cat/at home/3.PNG", "dog/1.webp"]):
        save(root / name, picture(i), **({"lossless": True} if name.endswith("webp") else {}))
    return root


def refused(source: Path, read=support, **options) -> str:
    """The message, without what it begins with."""
    with pytest.raises(UserError) as caught:
        read(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{'support' if read is support else 'query'}")
    return text


def test_classes_of_different_sizes(pets: Path) -> None:
    save(pets / ".hidden" / "1.png")
    save(pets / "dog" / "._1.png")
    photos = support(pets)
    assert photos.class_names == ("cat", "dog")
    assert photos.labels is not None
    assert photos.labels.dtype == np.int64
    assert photos.labels.tolist() == [0, 0, 0, 1]
    names = ["cat/1.png", "cat/2.bmp", "cat/at home/3.PNG", "dog/1.webp"]
    assert photos.paths == [str(pets / name) for name in names]
    assert photos.images.dtype == np.uint8
    for i in range(4):
        assert np.array_equal(photos.images[i].transpose(1, 2, 0), np.asarray(picture(i)))
    assert photos.bad == []
    assert support(pets, channels=1, size=5).images.shape == (4, 1, 5, 5)


def test_the_same_pixels_as_an_image_folder(pets: Path, tmp_path: Path) -> None:
    save(pets / "dog" / "big.jpg", picture(1, size=(97, 64)).resize((970, 640)))
    folder = ImageFolder(str(pets), 16, 3, [1.0, 0.0, 0.0], 0, None, False, str(tmp_path / "cache"))
    photos = support(pets, size=16)
    assert np.array_equal(folder.load().pool.images, photos.images)
    for i, path in enumerate(photos.paths):
        assert np.array_equal(decode_bytes(Path(path).read_bytes(), 3, 16), photos.images[i])


@pytest.mark.skipif(os.name != "posix", reason="names that are no Unicode")
def test_names_of_every_language(tmp_path: Path) -> None:
    save(tmp_path / "a\u0308" / "Bild 3.45 \u202fPM.png")  # a decomposed ä, as macOS writes it
    save(tmp_path / "猫" / "👨‍👩‍👧 <img onerror=alert(1)>.png")
    unprintable = os.fsencode(tmp_path / "猫") + b"/caf\xe9.png"
    Path(os.fsdecode(unprintable)).write_bytes(
        (tmp_path / "猫" / os.listdir(tmp_path / "猫")[0]).read_bytes()
    )
    save(tmp_path / "猫" / "two\nlines.png")
    photos = support(tmp_path)
    assert photos.class_names == ("ä", "猫")
    assert len(photos.paths) == 2
    assert len(photos.bad) == 2
    assert all("name holds signs" in line and line.isprintable() for line in photos.bad)
    labelled = queries(tmp_path, known=("猫", "ä"))
    assert labelled.labels is not None
    assert labelled.labels.tolist() == [1, 0]


# Every kind of file


def test_kinds_of_images(tmp_path: Path) -> None:
    save(tmp_path / "a" / "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)))  # red
    deep = Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16))
    save(tmp_path / "a" / "deep.png", deep)
    save(tmp_path / "b" / "clear.png", Image.new("RGBA", (8, 8), (10, 20, 30, 0)))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30])
    (tmp_path / "b" / "gif.jpg").write_bytes(b"")
    palette.save(tmp_path / "b" / "gif.jpg", format="GIF")
    photos = support(tmp_path, skip_bad=False)
    expected = {
        "cmyk.jpg": (255, 0, 0),
        "deep.png": (100,) * 3,
        "clear.png": (255,) * 3,
        "gif.jpg": (10, 20, 30),
    }
    for path, image in zip(photos.paths, photos.images, strict=True):
        wanted = np.array(expected[Path(path).name]).reshape(3, 1, 1)
        assert np.abs(image.astype(int) - wanted).max() <= 3, path


def upside_down(path: Path) -> Path:
    """White above black, told to be shown turned by half."""
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3
    return save(path, image, exif=exif, quality=100)


def test_exif_rotation_however_a_photo_comes(tmp_path: Path) -> None:
    path = upside_down(tmp_path / "x.jpg")
    seen = [queries(path).images[0], decode_bytes(path.read_bytes(), 3, 8)]
    with Image.open(path) as opened:
        seen.append(from_pil(opened, 3, 8))
        assert opened.size == (8, 8)
    for image in seen:
        assert image[:, :3].max() < 10
        assert image[:, 5:].min() > 245


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty, 0 bytes"),
        (b"hello", "not a PNG, JPEG, WebP or BMP image"),
        (b"\0\0\0\x18ftypheic", "but HEIC; convert it to JPEG"),
        (b"\0\0\0\x18ftypavif", "but AVIF; convert it to JPEG"),
        (b"II*\0 and so on", "but TIFF; convert it to JPEG"),
        (png(40_000, 40_000), "1,600,000,000 pixels, more than the 100,000,000"),
        (png(12_000, 10_000), "120,000,000 pixels, more than the 100,000,000"),
        (png(10_000, 10_001), "100,010,000 pixels, more than the 100,000,000"),
        (png(100, 100), "truncated"),
    ],
)
def test_a_bad_photo_is_named(data: bytes, reason: str, pets: Path) -> None:
    bad = pets / "cat" / "bad.jpg"
    bad.write_bytes(data)
    photos = support(pets)
    assert len(photos.paths) == 4
    assert len(photos.bad) == 1
    assert photos.bad[0].startswith(f"{bad}: ")
    assert reason in photos.bad[0]
    text = refused(pets, skip_bad=False)
    assert str(bad) in text
    assert reason in text
    assert text.endswith("skip_bad=true leaves such photos out")
    assert reason in refused(bad, queries)
    with pytest.raises(UserError, match="the image cannot be read") as caught:
        decode_bytes(data, 3, 8)
    assert reason in str(caught.value)


def test_a_large_photo_gives_no_warning_of_pillow(tmp_path: Path) -> None:
    """Above the 89 megapixels of Pillow's own warning; in a process without pytest's filters."""
    large = tmp_path / "large.png"
    Image.new("1", (9_500, 9_500)).save(large)
    (tmp_path / "bomb.png").write_bytes(png(12_000, 10_000))
    code = f"""
from pathlib import Path
from pipeline.data.photos import read_queries
photos = read_queries(Path({str(tmp_path)!r}), 1, 8, True)
print(photos.images.shape, len(photos.bad))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(1, 1, 8, 8) 1\n"
    assert "Warning" not in done.stderr


def test_a_file_above_the_limit_is_not_read(pets: Path, tmp_path: Path) -> None:
    huge = pets / "dog" / "2.png"
    with huge.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # takes no room on the disk
    assert "67,108,865 bytes, more than the 67,108,864" in support(pets).bad[0]
    folder = ImageFolder(str(pets), 8, 3, [1.0, 0.0, 0.0], 0, None, False, str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"2\.png.*67,108,865 bytes, more than"):
        folder.load()
    with pytest.raises(UserError, match="67,108,865 bytes, more than"):
        decode_bytes(bytes(MAX_BYTES + 1), 3, 8)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_pipe_is_not_waited_for(pets: Path) -> None:
    os.mkfifo(pets / "dog" / "2.png")
    (pets / "dog" / "3.png").symlink_to("/dev/zero")
    assert [line.rpartition(": ")[2] for line in support(pets).bad] == ["not a regular file"] * 2


# Folders that are not as they should be


def test_files_of_other_suffixes_are_counted(pets: Path) -> None:
    for name in ("dog/1.heic", "dog/2.HEIC", "cat/notes.txt", "README"):
        (pets / name).write_bytes(b"")
    save(pets / "loose.png")
    bad = support(pets).bad
    assert len(bad) == 2
    assert bad[0].startswith(f"{pets}: left out for their suffix: 2 .heic - convert them to JPEG")
    assert "1 .txt" in bad[0]
    assert "1 without one" in bad[0]
    assert bad[1] == f"{pets / 'loose.png'}: in no folder of a class"


def test_folders_that_are_no_support(pets: Path, tmp_path: Path) -> None:
    assert "not found; expected one folder a class" in refused(tmp_path / "absent")
    assert "3.PNG: neither a folder nor a CSV" in refused(pets / "cat" / "at home" / "3.PNG")
    assert "no folder of a class in it (images: 1)" in refused(pets / "dog")
    (pets / "eel").mkdir()
    assert "class 'eel' holds no image; expected" in refused(pets)
    (pets / "eel" / "1.heic").write_bytes(b"")
    assert "class 'eel' holds no image: left out for their suffix: 1 .heic" in refused(pets)
    save(tmp_path / "one" / "cat" / "1.png")
    assert "only one class, 'cat'" in refused(tmp_path / "one")


def test_a_class_may_not_be_skipped_whole(pets: Path) -> None:
    (pets / "dog" / "1.webp").write_bytes(b"")
    assert "class 'dog' has no photo that can be read; first" in refused(pets)


def test_query_folders(pets: Path, tmp_path: Path) -> None:
    photos = queries(pets)
    assert len(photos.images) == 4
    assert photos.labels is None
    assert photos.class_names == ()
    known = queries(pets, known=("ape", "dog", "cat"))
    assert known.labels is not None
    assert known.labels.tolist() == [2, 2, 2, 1]
    assert known.class_names == ("ape", "dog", "cat")
    assert queries(pets, known=("dog", "eel")).labels is None
    assert queries(pets / "dog", known=("dog", "cat")).labels is None
    one = queries(pets / "dog" / "1.webp", known=("dog", "cat"))
    assert one.paths == [str(pets / "dog" / "1.webp")]
    assert one.labels is None
    (tmp_path / "empty").mkdir()
    assert "no image in it; expected" in refused(tmp_path / "empty", queries)
    (tmp_path / "empty" / "1.heic").write_bytes(b"")
    assert "1 .heic - convert them to JPEG" in refused(tmp_path / "empty", queries)
    assert "not found" in refused(tmp_path / "absent", queries)
    (tmp_path / "empty" / "1.png").write_bytes(b"")
    assert "there is no photo that can be read; first" in refused(tmp_path / "empty", queries)


# Lists


def listed(pets: Path, text: str, encoding: str = "utf-8") -> Path:
    file = pets / "labels.csv"
    file.write_bytes(text.encode(encoding))
    return file


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    "text",
    [
        "path,label\ncat/1.png,Katze\ndog/1.webp,Hünd\n",
        'Label;note;FILENAME\r\nKatze;"a,\nb";cat/1.png\r\n\r\nHünd;;dog/1.webp\r\n;;\r\n',
        'image\tClass\n"cat\\1.png"\tKatze\ndog/../dog/1.webp\t Hünd ',
        'file,class\n"./cat/1.png","Katze"\ndog/1.webp,Hu\u0308nd',
    ],
)
def test_lists(text: str, encoding: str, pets: Path) -> None:
    photos = support(listed(pets, text, encoding), skip_bad=False)
    assert photos.class_names == ("Hünd", "Katze")
    assert photos.labels is not None
    assert photos.labels.tolist() == [1, 0]
    assert [Path(path).resolve() for path in photos.paths] == [
        pets / "cat/1.png",
        pets / "dog/1.webp",
    ]
    assert np.array_equal(photos.images[0].transpose(1, 2, 0), np.asarray(picture(0)))


ROWS = "path,label\ncat/1.png,cat\ndog/1.webp,dog\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its first row is nothing; expected a header with one of path"),
        ("cat/1.png,cat\n", "its first row is cat/1.png, cat; expected a header"),
        ("path\ncat/1.png\n", "its first row is path; expected a header with one of path, file, image, filename and one of label, class"),
        ("path,file,label\n", "its first row is path, file, label"),
        ("path,label\n", "no rows below its header"),
        (ROWS + "cat/2.bmp\n", "row 4: 1 cells, but 2 in the header"),
        (ROWS + "\ncat/2.bmp,\n", "row 5: cat/2.bmp: its label is empty"),
        (ROWS + ",cat\n", "row 4: its path is empty"),
        (ROWS + "cat/../cat/1.png,dog\n", "row 4: cat/../cat/1.png: the same file as in row 2"),
        (ROWS + "../secret.png,dog\n", "row 4: ../secret.png: outside of the folder of the CSV"),
        (ROWS + "..\\secret.png,dog\n", r"row 4: ..\secret.png: outside of the folder of the CSV"),
        (ROWS + "/etc/passwd,dog\n", "row 4: /etc/passwd: outside of the folder of the CSV"),
        (ROWS + "C:\\x.png,dog\n", "outside of the folder of the CSV"),
        (ROWS + "link/secret.png,dog\n", "row 4: link/secret.png: outside of the folder of the CSV"),
        (ROWS + "x\0.png,dog\n", r"row 4: 'x\x00.png' or its class holds signs that cannot be shown"),
        (ROWS + '"x,dog\n', "cannot be read as a CSV"),
    ],
)  # fmt: skip
def test_bad_lists(text: str, message: str, pets: Path) -> None:
    save(pets.parent / "secret.png")
    (pets / "link").symlink_to(pets.parent)
    with pytest.raises(UserError) as caught:
        support(listed(pets, text))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"support={pets / 'labels.csv'}: ")


def test_a_list_that_is_no_utf8(pets: Path) -> None:
    assert "not UTF-8 text" in refused(listed(pets, ROWS + "cat/2.bmp,Kätzchen\n", "latin-1"))


def test_a_list_with_a_missing_file(pets: Path) -> None:
    file = listed(pets, ROWS + "cat/absent.png,cat\ncat,cat\n" + "x" * 5000 + ",cat\n")
    photos = support(file)
    assert photos.bad.pop().endswith("x (row 6): File name too long")
    assert photos.bad == [
        f"{pets / 'cat/absent.png'} (row 4): No such file or directory",
        f"{pets / 'cat'} (row 5): not a regular file",
    ]
    assert "absent.png (row 4): No such file" in refused(file, skip_bad=False)
    file = listed(pets, "path,label\ncat/1.png,cat\nabsent.png,dog\n")
    assert "class 'dog' has no photo that can be read; first" in refused(file)


def test_lists_of_queries(pets: Path) -> None:
    photos = queries(listed(pets, "path\ndog/1.webp\ncat/1.png\ncat/1.png\n"), known=("cat", "dog"))
    assert len(photos.images) == 3
    assert photos.labels is None
    photos = queries(listed(pets, ROWS), known=("dog", "cat"))
    assert photos.labels is not None
    assert photos.labels.tolist() == [1, 0]
    assert queries(listed(pets, ROWS)).labels is None
    text = refused(listed(pets, ROWS), queries, known=("dog", "eel"))
    assert "row 2: class 'cat' is none of dog, eel" in text


# Images in memory


def test_arrays_and_opened_images() -> None:
    image = picture(1)
    expected = np.asarray(image).transpose(2, 0, 1)
    assert np.array_equal(from_pil(image, 3, 8), expected)
    assert np.array_equal(from_array(np.asarray(image), 3, 8), expected)
    assert np.array_equal(from_array(expected.transpose(1, 2, 0)[::-1], 3, 8), expected[:, ::-1])
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    assert (from_array(clear, 1, 4) == 255).all()
    assert from_array(np.zeros((20, 30), dtype=np.uint8), 3, 4).shape == (3, 4, 4)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 3)),
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((0, 8), np.uint8),
        np.zeros(8, np.uint8),
    ],
)
def test_arrays_that_are_no_image(array: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"the image is .*; expected uint8 \(H, W\)"):
        from_array(array, 3, 8)


def test_opened_images_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    picture(size=(64, 64)).save(file, format="PNG")
    with pytest.raises(UserError, match=r"the image cannot be read.*truncated"):
        from_pil(Image.open(io.BytesIO(file.getvalue()[:2000])), 3, 8)
    monkeypatch.setattr(decode, "MAX_PIXELS", 63 * 64)
    with pytest.raises(UserError, match="pixels, more than"):
        from_pil(Image.open(file), 3, 8)
