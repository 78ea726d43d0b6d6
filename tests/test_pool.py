"""The pool's cache on disk: atomic, rebuilt when it should be, memory-mapped."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.pool import PROJECT, Allocate, ImagePool, cached_pool
from pipeline.errors import UserError

LABELS, NAMES = np.array([0, 1, 0]), ["a", "b"]


def fill(value: int, rows: int = 3) -> Callable[[Allocate], tuple[np.ndarray, list[str]]]:
    def build(allocate: Allocate) -> tuple[np.ndarray, list[str]]:
        images = allocate(3, 1, 2, 2)
        images[:] = value + np.arange(3).reshape(3, 1, 1, 1)
        return LABELS[:rows], NAMES

    return build


def refuse(_: Allocate) -> tuple[np.ndarray, list[str]]:
    raise AssertionError("built although cached")


def test_built_once_then_opened_as_a_read_only_memory_map(tmp_path: Path) -> None:
    built = cached_pool("toy", {"v": 1}, fill(5), tmp_path)
    opened = cached_pool("toy", {"v": 1}, refuse, tmp_path)
    assert isinstance(opened.images, np.memmap)
    assert not opened.images.flags.writeable
    assert opened.images[:, 0, 0, 0].tolist() == [5, 6, 7]
    assert opened.labels.tolist() == [0, 1, 0]
    assert (opened.class_names, opened.fingerprint) == (("a", "b"), built.fingerprint)


def test_another_recipe_is_another_cache(tmp_path: Path) -> None:
    old = cached_pool("toy", {"v": 1}, fill(5), tmp_path)
    new = cached_pool("toy", {"v": 2}, fill(50), tmp_path)
    assert new.images[0, 0, 0, 0] == 50
    assert new.fingerprint != old.fingerprint
    assert cached_pool("toy", {"v": 1}, refuse, tmp_path).fingerprint == old.fingerprint


def test_rows_left_over_are_cut_off(tmp_path: Path) -> None:
    pool = cached_pool("toy", {}, fill(5, rows=2), tmp_path)
    assert pool.images.shape == (2, 1, 2, 2)
    assert pool.images[:, 0, 0, 0].tolist() == [5, 6]
    assert sorted(p.name for p in next(tmp_path.iterdir()).iterdir()) == [
        "images.npy",
        "labels.npy",
        "meta.json",
    ]


def test_a_build_that_raises_leaves_nothing(tmp_path: Path) -> None:
    def fail(allocate: Allocate) -> tuple[np.ndarray, list[str]]:
        allocate(3, 1, 2, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_pool("toy", {}, fail, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(cached_pool("toy", {}, fill(1), tmp_path).labels) == 3


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data cache .*file.*cannot be written"):
        cached_pool("toy", {}, fill(1), tmp_path / "file")


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (np.zeros((1, 1, 2, 2)), [0], ["a"], "uint8"),
        (np.zeros((1, 2, 2), np.uint8), [0], ["a"], "uint8"),
        (np.zeros((1, 1, 2, 2), np.uint8), [0, 0], ["a"], "1 images but 2 labels"),
        (np.zeros((1, 1, 2, 2), np.uint8), [0], ["a", "a"], "not unique"),
        (np.zeros((1, 1, 2, 2), np.uint8), [1], ["a"], r"0\.\.0"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(
    images: np.ndarray, labels: list[int], names: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ImagePool.from_arrays(images, np.array(labels), names)


# A build in a process of its own: says that it has begun, then waits for a file before it ends.
CHILD = """
import sys, time
from pathlib import Path
import numpy as np
from pipeline.data.pool import cached_pool

folder, begun, go = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])

def build(allocate):
    allocate(3, 1, 2, 2)[:] = 9
    begun.write_text("")
    while not go.exists():
        time.sleep(0.01)
    return np.array([0, 1, 0]), ["a", "b"]

print(cached_pool("toy", {}, build, folder).fingerprint)
"""


def child(*paths: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, *map(str, paths)]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, "the child did not begin"
        time.sleep(0.01)


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    cache, go = tmp_path / "cache", tmp_path / "go"
    begun = [tmp_path / "begun0", tmp_path / "begun1"]
    children = [child(cache, file, go) for file in begun]
    wait_for(*begun)
    assert len(list(cache.iterdir())) == 2  # neither has swept the other's part folder
    go.write_text("")
    first, second = (process.communicate(timeout=30)[0] for process in children)
    assert [process.returncode for process in children] == [0, 0]
    assert first == second == cached_pool("toy", {}, refuse, cache).fingerprint + "\n"
    assert len(list(cache.iterdir())) == 1


def test_a_killed_build_leaves_no_cache_and_is_swept_by_the_next(tmp_path: Path) -> None:
    cache, begun = tmp_path / "cache", tmp_path / "begun"
    process = child(cache, begun, tmp_path / "never")
    wait_for(begun)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    [part] = cache.iterdir()
    assert ".part-" in part.name
    pool = cached_pool("toy", {}, fill(1), cache)
    assert pool.images[0, 0, 0, 0] == 1
    [kept] = cache.iterdir()
    assert json.loads((kept / "meta.json").read_text())["fingerprint"] == pool.fingerprint


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"data cache .*: cannot be written .*No space left"):
        cached_pool("toy", {}, fill(1), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_of_a_cache_is_named(tmp_path: Path) -> None:
    cached_pool("toy", {}, fill(1), tmp_path)
    [target] = tmp_path.iterdir()
    (target / "meta.json").unlink()
    with pytest.raises(UserError, match=f"{target.name}: is in the way"):
        cached_pool("toy", {}, fill(1), tmp_path)


def test_loader_processes_open_the_cache_instead_of_being_sent_it(tmp_path: Path) -> None:
    def build(allocate: Allocate) -> tuple[np.ndarray, list[str]]:
        allocate(1000, 1, 20, 20)[:] = 7
        return np.zeros(1000, dtype=np.int64), ["a"]

    pool = cached_pool("toy", {}, build, tmp_path)
    sent = pickle.dumps(pool)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert again.fingerprint == pool.fingerprint
    assert np.array_equal(again.images, pool.images)
    loose = ImagePool.from_arrays(np.array(pool.images), pool.labels, ["a"])
    assert pickle.loads(pickle.dumps(loose)).fingerprint == pool.fingerprint
