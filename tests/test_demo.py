"""The page to try a learner: what it does with photos, what it says, and all of it in a browser."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import cli, config, demo, trial, uploads
from pipeline.compose import compose_config
from pipeline.data.digits import Digits
from pipeline.errors import UserError
from pipeline.trained import Given
from tests.image_files import picture, save
from tests.test_contact_sheet import EVIL, Page

REPO = Path(__file__).resolve().parents[1]
SHAPE = (3, 16, 16)


def given(learner: str = "pixel_centroid", *overrides: str) -> Given:
    torch.manual_seed(0)
    fixed = ["data=image_folder", "data.root=photos", "data.image_shape=[3,16,16]"]
    cfg = compose_config("train", [f"learner={learner}", "backbone.width=8", *fixed, *overrides])
    built = config.build_learner(cfg, SHAPE).eval()
    said = {"learner": built.label, "backbone": "", "protocol": built.protocol, "run": "abc"}
    return Given(built, cfg, said)


def photos(value: int, count: int, seed: int = 0) -> list[np.ndarray]:
    """Noise around one brightness: a class that nearest means tell apart."""
    random = np.random.default_rng((value, seed))
    return [(value + random.integers(-20, 20, SHAPE)).astype(np.uint8) for _ in range(count)]


def taught(counts: tuple[int, ...] = (12, 12), reject: float = 0.05, names=("dark", "light")):
    return trial.learn(given(), names, [photos(40, counts[0]), photos(200, counts[1])], reject)


def test_uploads_are_read_and_deleted(tmp_path: Path) -> None:
    good = [save(tmp_path / str(i) / f"{i}.png", picture(i, size=(40, 30))) for i in range(3)]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "notes.jpg").write_text("no image")
    (tmp_path / "bad" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    gone = tmp_path / "gone.png"
    bad = [tmp_path / "bad" / "notes.jpg", tmp_path / "bad" / "phone.heic", gone]
    images, lines = uploads.read_uploads([*map(str, bad), *map(str, good)], SHAPE, room=2)
    assert [image.shape for image in images] == [SHAPE, SHAPE]
    assert images[0].dtype == np.uint8
    assert lines == [
        "notes.jpg: the image cannot be read (not a PNG, JPEG, WebP or BMP image)",
        "phone.heic: the image cannot be read (not a PNG, JPEG, WebP or BMP image but HEIC; "
        "convert it to JPEG)",
        "gone.png: No such file or directory",
        "1 of 6 photos left out: there is room for 2 more",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "counts", "line"),
    [
        (["", ""], [0, 0], "Two classes are needed at least, each with a name and photos."),
        (["dark", " "], [2, 0], "Two classes are needed at least, each with a name and photos."),
        (["dark", " "], [2, 2], "Class 2 has photos but no name: type one."),
        (["dark", "light"], [2, 0], "'light' has no photos yet: drop a few, or clear its name."),
        (["a  b", " a b"], [2, 2], "Two classes are named 'a b': give each a name of its own."),
    ],
)
def test_what_is_missing_is_said(names, counts, line) -> None:
    rows = [photos(40 + 100 * i, n) for i, n in enumerate(counts)]
    with pytest.raises(UserError) as caught:
        trial.learn(given(), names, rows, 0.05)
    assert str(caught.value) == line
    assert line.replace("'", "&#39;") in trial.problem_html(caught.value)


def test_a_learner_of_five_classes_takes_no_two() -> None:
    with pytest.raises(UserError, match="2 classes, but this MAML was trained for 5"):
        trial.learn(given("maml"), ["a", "b"], [photos(40, 2), photos(200, 2)], 0.05)


def test_photos_are_classified_and_those_of_nothing_rejected() -> None:
    told: list[int] = []
    rows = [photos(40, 12), [], photos(200, 12)]
    learned = trial.learn(given(), [" dark ", "", "light"], rows, 0.05, told.append)
    assert learned.classifier.class_names == ("dark", "light")
    assert told[-1] == 24
    queries = [*photos(40, 1, seed=1), rows[2][3], *photos(120, 1)]
    dark, light, neither = trial.answer(learned, queries)
    assert [a.rejected for a in (dark, light, neither)] == [False, False, True]
    assert [dark.shares[0][0], light.shares[0][0]] == ["dark", "light"]
    for answer in (dark, light, neither):
        values = [share for _, share in answer.shares]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1)
        assert len(answer.nearest) == trial.NEAREST
        similarities = [near.similarity for near in answer.nearest]
        assert similarities == sorted(similarities, reverse=True)
    assert light.nearest[0].photo == 12 + 3  # the photo itself, of the support photos
    assert light.nearest[0].similarity == pytest.approx(1)
    assert {near.name for near in light.nearest} == {"light"}


@pytest.mark.parametrize("learner", ["protonet", "maml"])
def test_nearest_by_the_network_of_every_kind_of_learner(learner: str) -> None:
    of = given(learner, "data.n_way=2", "data.train_n_way=2", "backbone.norm=group")
    rows = [photos(40, 3), photos(200, 3)]
    learned = trial.learn(of, ["dark", "light"], rows, 0.05)
    (answer,) = trial.answer(learned, [rows[1][0]])
    assert (answer.nearest[0].photo, answer.nearest[0].name) == (3, "light")
    assert answer.nearest[0].similarity == pytest.approx(1, abs=1e-4)


def test_what_the_estimate_says() -> None:
    page = Page(trial.estimate_html(taught()))
    text = " ".join(page.text.split())
    assert "100 % right on photos that it was not shown" in text
    assert "Of your 24 photos, 24 were right when each was left out" in text
    assert "expect between 75 % and 100 % (95 % interval" in text
    assert "cannot be told apart" not in text

    rows = [photos(40, 6) + photos(200, 1, seed=5), photos(200, 6)]  # one in the wrong class
    page = Page(trial.estimate_html(trial.learn(given(), ["dark", "light"], rows, 0.05)))
    assert "dark→ light" in page.text
    assert len(page.thumbnails()) == 1
    assert "takes 19 photos of classes with two or more, and there are 13" in page.text

    one_each = " ".join(Page(trial.estimate_html(taught((1, 1)))).text.split())
    assert "Learned 2 classes from 2 photos" in one_each
    assert "nan" not in one_each


def test_what_answers_show_and_that_names_do_no_harm() -> None:
    learned = taught(names=(EVIL, "light"))
    assert trial.answers_html(learned, []) == trial.photos_html([]) == ""
    queries = [*photos(40, 1, seed=1), *photos(120, 1)]
    page = Page(trial.answers_html(learned, queries))
    assert EVIL in page.text
    assert "Looks like none of these" in page.text
    assert len(page.thumbnails()) == 2 * (1 + trial.NEAREST)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "style"})
    assert not any("onerror" in attrs for _, attrs in page.tags)
    waiting = Page(trial.answers_html(None, queries))
    assert "Press Learn above to have these photos classified" in waiting.text
    assert len(waiting.thumbnails()) == 2


def test_the_page_says_which_learner_it_is() -> None:
    assert trial.about(given()) == (
        "Learner: **PixelCentroid**, run `abc`. It is *inductive*: each photo is judged on its own."
    )
    text = trial.about(given("maml"))
    assert "transductive" in text
    assert "dropped together are judged together" in text
    assert "It takes exactly 5 classes." in text
    packaged = given()._replace(
        provenance={"learner": "L", "backbone": "B", "protocol": "inductive", "weights": "PACKAGED"}
    )
    assert "**L** on B, which knows ImageNet" in trial.about(packaged)


def test_the_example_has_a_digit_that_it_does_not_teach() -> None:
    names, shots, queries = trial.example(given(), 3)
    assert names == ["zero", "one", "two"]
    assert [images.shape for images in shots] == [(6, *SHAPE)] * 3
    assert queries.shape == (4, *SHAPE)
    taught = {image.tobytes() for images in shots for image in images}
    assert taught.isdisjoint({image.tobytes() for image in queries})


def test_only_loopback_is_loopback() -> None:
    assert all(map(demo.is_loopback, ("127.0.0.1", "localhost", "127.0.0.2", "::1", "[::1]")))
    assert not any(map(demo.is_loopback, ("0.0.0.0", "::", "192.168.1.5", "example.org")))


def exit_of(monkeypatch, capsys, *arguments: str) -> tuple[object, list[str]]:
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main("demo", demo.run)
    return stop.value.code, capsys.readouterr().err.splitlines()


def test_bad_input_is_one_line(monkeypatch, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: True)
        code, lines = exit_of(monkeypatch, capsys, f"port={port}")
        assert code == 2
        assert lines == [
            f"error: port: {port} is taken (Address already in use); try port={port + 1}"
        ]
    code, lines = exit_of(monkeypatch, capsys, "host=192.0.2.1")
    assert (code, lines) == (2, ["error: host: 192.0.2.1 is no address of this machine"])
    code, lines = exit_of(monkeypatch, capsys, "max_mb=100")
    assert code == 2
    assert lines == ["error: max_mb: found 100; Input should be less than or equal to 64"]
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    code, lines = exit_of(monkeypatch, capsys)
    assert (code, lines) == (2, ["error: demo: gradio is not installed; pip install '.[demo]'"])


def test_the_folder_of_uploads_is_swept(tmp_path: Path) -> None:
    old, new = tmp_path / "a" / "old.png", tmp_path / "b" / "new.png"
    for path in (old, new):
        path.parent.mkdir()
        path.write_bytes(b"x")
    for path in (old, old.parent):
        os.utime(path, (time.time() - 100,) * 2)
    uploads.sweep(tmp_path, age=60)
    assert not old.exists()
    assert new.exists()
    os.utime(tmp_path / "a", (time.time() - 100,) * 2)
    uploads.sweep(tmp_path, age=60)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert uploads.first(["a", "b"]) == "a; b"
    assert uploads.first(["a", "b", "c", "d", "e"]) == "a; b; c; and 2 more"


STARTED = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background job
def watch(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    if host not in ("127.0.0.1", "localhost", b"127.0.0.1", None):
        print(f"outside: {host}", file=sys.stderr, flush=True)
sys.addaudithook(watch)
sys.argv = ["demo", *sys.argv[1:]]
runpy.run_module("pipeline.demo", run_name="__main__")
"""


@pytest.mark.slow
def test_in_a_browser(tmp_path: Path) -> None:
    """Teach two digits, ask for others; nothing leaves the machine, and nothing stays on it."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[demo]'")
    driver = pytest.importorskip("playwright.sync_api", reason="pip install '.[browser]'")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    for number in (0, 1):
        digit_files(tmp_path / "digits", number, 7)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED, f"port={port}"],
        cwd=REPO,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == f"page  http://127.0.0.1:{port}/\n", process.communicate()[1]
        with driver.sync_playwright() as player:
            browser = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            visit(browser, f"http://127.0.0.1:{port}/", tmp_path / "digits")
            (folder,) = temporary.glob("photos-*")
            kept = [p for p in folder.rglob("*") if p.is_file()]
            assert all(p.stat().st_size == 0 for p in kept), kept  # Gradio's, without a content
            assert not list(folder.rglob("*.png"))
            browser.close()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    assert not list(temporary.glob("photos-*"))


def digit_files(folder: Path, number: int, count: int) -> None:
    pool = Digits().load().pool
    scans = pool.images[np.flatnonzero(pool.labels == number)[:count], 0]
    for i, scan in enumerate(scans):
        save(folder / f"{number}-{i}.png", Image.fromarray(scan))


def visit(browser, url: str, digits: Path) -> None:
    page = browser.new_page(viewport={"width": 400, "height": 900})
    hosts, errors = set(), []
    page.on(
        "request",
        lambda r: hosts.add(re.sub(r"^\w+://([^/]*).*", r"\1", r.url[:200], flags=re.DOTALL)),
    )
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(url)
    learn = page.get_by_role("button", name="Learn")
    learn.click()
    page.get_by_text("Two classes are needed at least").wait_for()
    for i, name in enumerate(("zero", "one")):
        page.get_by_label(f"Class {i + 1}", exact=True).fill(name)
        files = [str(p) for p in sorted(digits.glob(f"{i}-*"))[:6]]
        page.locator("input[type=file]").nth(i).set_input_files(files)
        page.locator(".t-class").nth(i).locator("img").nth(5).wait_for()
    learn.click()
    page.get_by_text("right on photos that it was not shown").wait_for()
    asked = [str(digits / "0-6.png"), str(digits / "1-6.png")]
    page.locator("input[type=file]").last.set_input_files(asked)
    page.locator(".t-answer").nth(1).wait_for()
    said = page.locator(".t-answer h3").all_inner_texts()
    assert [text.split()[0] for text in said] == ["zero", "one"]
    assert page.locator(".t-near img").count() == 2 * trial.NEAREST
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert errors == []
    assert {host for host in hosts if not host.startswith(("data:", "blob:"))} == {
        url.split("/")[2]
    }
    page.close()
