"""The contact sheet: its order, its figures, and what names of files must not do to it."""

import io
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.contact_sheet import Shown, contact_sheet, percent
from pipeline.data.photos import read_support
from tests.image_files import picture, save

EVIL = "<img src=x onerror=alert(1)>\"'&amp;</style><script>"


class Page(HTMLParser):
    """The elements of a page, its text, and its figures as (class, text)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.figures: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "figure":
            self.figures.append((dict(attrs).get("class") or "", ""))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.figures:
            kind, text = self.figures[-1]
            self.figures[-1] = (kind, text + data)

    def thumbnails(self) -> list[Image.Image]:
        found = [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]
        assert all(address.startswith("data:image/jpeg;base64,") for address in found)
        return [Image.open(io.BytesIO(b64decode(address.partition(",")[2]))) for address in found]


def shown(
    path: str = "x.jpg", predicted: str = "cat", confidence: float = 0.5, rejected: bool = False,
    true: str | None = None, value: int = 0, channels: int = 3,
) -> Shown:  # fmt: skip
    image = np.full((channels, 8, 8), value, dtype=np.uint8)
    return Shown(path, image, predicted, confidence, rejected, true)


def test_photos_that_need_a_look_come_first() -> None:
    rows = [
        shown("sure.jpg", confidence=0.9),
        shown("unsure.jpg", confidence=0.4),
        shown("odd.jpg", confidence=0.95, rejected=True),
    ]
    page = Page(contact_sheet(rows, "My photos", ["a note"]))
    for (_, text), name in zip(page.figures, ["odd.jpg", "unsure.jpg", "sure.jpg"], strict=True):
        assert name in text.split()
    assert "looks like none of the classes" in page.figures[0][1]
    assert "looks like none" not in page.figures[1][1]
    assert "40 %" in page.figures[1][1]
    assert "My photos" in page.text
    assert "a note" in page.text
    assert "✓" not in page.text  # the true classes are not known
    assert '<option value="wrong"' not in contact_sheet(rows, "", [])


def test_true_classes_are_compared_and_counted() -> None:
    rows = [shown(f"{i}.jpg", "cat", 0.5 + i / 100, true="cat") for i in range(7)]
    rows += [shown("a.jpg", "dog", 0.9, true="eel"), shown("b.jpg", "dog", 0.2, True, "cat")]
    rows += [shown("c.jpg", "dog", 0.1)]
    page = Page(contact_sheet(rows, "", []))
    kinds = [kind.split() for kind, _ in page.figures]
    assert kinds[0] == ["class1", "none", "wrong"]
    assert kinds[1] == ["class1"]
    assert kinds[2] == ["class0", "right"]
    assert kinds[-1] == ["class1", "wrong"]
    assert "✗ it is cat" in page.figures[0][1]
    assert "✓ right" in page.figures[2][1]
    # Wilson's score interval, its formula by hand: 7 of 9 and, without the rejected, 7 of 8.
    assert "7 of 9; 95 % interval 45 to 94 %" in page.text
    assert "7 of 8; 95 % interval 53 to 98 %" in page.text
    for cells in (
        ["cat", "7", "0", "8", "7"],
        ["dog", "3", "1", "0", "0"],
        ["eel", "0", "0", "1", "0"],
    ):
        row = "</td><td>".join(cells)
        assert f"<tr><td>{row}</td></tr>" in contact_sheet(rows, "", [])


def test_no_name_becomes_markup() -> None:
    rows = [shown(f"photos/{EVIL}.jpg", EVIL, 0.5, True, true="dog"), shown(true=EVIL)]
    text = contact_sheet(rows, EVIL, [EVIL])
    page = Page(text)
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "dl", "div", "dt", "dd",
               "details", "summary", "table", "tr", "th", "td", "form", "label", "select", "option",
               "figure", "img", "figcaption", "b", "span", "i", "bdi"}  # fmt: skip
    assert {tag for tag, _ in page.tags} <= allowed
    assert [attrs for tag, attrs in page.tags if tag == "img" and "onerror" in attrs] == []
    assert f"{EVIL.rpartition('/')[2]}.jpg" in page.text
    titles = [attrs["title"] for _, attrs in page.tags if "title" in attrs]
    assert f"photos/{EVIL}.jpg" in titles
    assert text.count("</style>") == 1
    policy = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_thumbnails_are_of_the_file_or_of_what_the_learner_saw(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera"
    tall = Image.new("RGB", (400, 800), "red")  # upright, it is wide
    there = save(tmp_path / "there.jpg", tall, exif=exif)
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"no image")
    rows = [
        shown(str(there), confidence=0.1),
        shown(str(damaged), confidence=0.2, value=100),
        shown(str(tmp_path / "absent.jpg"), confidence=0.3, value=200),
        shown("", confidence=0.4, value=50),
    ]
    pictures = Page(contact_sheet(rows, "", [])).thumbnails()
    assert [p.size for p in pictures] == [(160, 160)] * 4
    for found, colour in zip(
        pictures, [(254, 0, 0), (100,) * 3, (200,) * 3, (50,) * 3], strict=True
    ):
        assert np.abs(np.asarray(found).astype(int) - colour).max() <= 2
        assert not found.getexif()
    grey = [shown(str(there), channels=1), shown("absent.jpg", channels=1, value=9)]
    assert [p.mode for p in Page(contact_sheet(grey, "", [])).thumbnails()] == ["L", "L"]


def test_support_photos_stand_at_the_end(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        save(tmp_path / name, picture())
    support = read_support(tmp_path, 3, 8, True)
    page = Page(contact_sheet([shown(predicted="cat")], "", [], support))
    assert len(page.thumbnails()) == 4
    assert "cat (2)" in page.text
    assert "dog (1)" in page.text
    # A class that was never predicted is in the table: support photos, predicted, like none.
    assert "<td>dog</td><td>1</td><td>0</td><td>0</td>" in contact_sheet([shown()], "", [], support)


def test_two_thousand_photos(tmp_path: Path) -> None:
    path = str(save(tmp_path / "x.png", picture(size=(300, 200))))
    rows = [shown(path, f"class {i % 40}", i / 2000) for i in range(2000)]
    text = contact_sheet(rows, "", [])
    assert len(text) < 20e6
    page = Page(text)
    assert len(page.figures) == 2000
    assert all(attrs["loading"] == "lazy" for tag, attrs in page.tags if tag == "img")


def test_no_photo_is_a_page_too() -> None:
    assert "<figure" not in contact_sheet([], "", [])


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (0.001, "< 1 %"),
        (0.5, "50 %"),
        (0.9949, "99 %"),
        (0.9999, "> 99 %"),
        (1, "100 %"),
    ],
)
def test_a_percentage_is_not_rounded_to_certainty(share: float, text: str) -> None:
    assert percent(share) == text
