"""What a served model does with what it is sent."""

import base64
import io
import json
import pickle
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pipeline import serving, serving_learner
from pipeline.data.files import MAX_BYTES
from pipeline.errors import UserError
from pipeline.serving import MAX_SERVED, ServedClassifier, _load_pyfunc, in_server
from pipeline.serving_learner import ServedLearner
from pipeline.trained import save_learner
from tests.test_photos import png
from tests.tiny import NAMES, saved, strokes, tiny_classifier, tiny_given


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ServedClassifier:
    return _load_pyfunc(str(saved(tiny_classifier(), tmp_path_factory.mktemp("model"))))


@pytest.fixture
def server(monkeypatch) -> None:
    monkeypatch.setenv("__pyfunc_model_path__", "/somewhere")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """(H, W) of the second class."""
    return strokes(1, seed=5)[0][1, 0]


def as_png(photo: np.ndarray) -> bytes:
    Image.fromarray(photo).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def test_an_image_is_the_same_in_whatever_form(model, photo, tmp_path):
    data = as_png(photo)
    path = tmp_path / "a photo.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    rgb = np.stack([photo] * 3, axis=2)
    forms = [str(path), path, data, bytearray(data), text, f"data:image/png;base64,{text}",
             "\n".join(re.findall(".{1,76}", text)), Image.open(path), photo, rgb,
             np.concatenate([rgb, np.full_like(rgb[..., :1], 255)], axis=2)]  # fmt: skip
    expected = model.classifier.predict(photo[None, None])
    whole = [*forms, forms, tuple(forms), pd.DataFrame({"image": forms, "other": 1}),
             pd.Series(forms), {"image": forms}, [{"image": each} for each in forms],
             np.array([str(path), text]), np.stack([rgb, rgb])]  # fmt: skip
    for given in whole:
        answer = model.predict(given)
        alone = not isinstance(given, list | tuple | dict | pd.DataFrame | pd.Series)
        if isinstance(given, np.ndarray) and (given.ndim == 4 or given.dtype.kind == "U"):
            assert len(answer) == 2
        else:
            assert len(answer) == (1 if alone else len(forms))
        columns = ["class", "confidence", "looks_like_none", "p_known"]
        assert list(answer) == columns + [f"p({name})" for name in NAMES]
        for row in answer.to_dict("records"):
            assert row["class"] == NAMES[1]
            assert row["confidence"] == row[f"p({NAMES[1]})"]
            each = [row[f"p({name})"] for name in NAMES]
            assert np.allclose(each, expected.probabilities[0], atol=1e-5)
            assert row["p_known"] == expected.known[0]
            assert row["looks_like_none"] == expected.rejected[0]


def test_nothing_in_nothing_out(model):
    for empty in ([], pd.DataFrame({"image": []}), np.zeros((0, 5, 5, 3), np.uint8)):
        assert model.predict(empty).shape == (0, 4 + len(NAMES))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("no/such.jpg", "image[0]: neither a file nor base64: found 'no/such.jpg'"),
        (Path("no/such.jpg"), "image[0]: no/such.jpg: cannot be read ("),
        ("data:image/png,x", "image[0]: a data URL, but not of base64: expected data:image/...;"),
        (b"", "image[0]: the image cannot be read (the file is empty, 0 bytes)"),
        (b"II*\0 and more", "image[0]: the image cannot be read (not a PNG, JPEG, WebP or BMP"),
        ([np.zeros((4, 4), np.uint8), np.zeros((4, 4))], "image[1]: the image is float64 (4, 4);"),
        (np.zeros((4, 4, 2), np.uint8), "image[0]: the image is uint8 (4, 4, 2); expected"),
        (np.zeros((4, 4), np.int64), "image[0]: the image is int64 (4, 4); expected"),
        (None, "image[0]: found NoneType; expected a path, the bytes of a file, base64 text, a"),
        (pd.DataFrame({"file": ["x"]}), "columns: found 'file'; expected 'image'"),
        (png(20_000, 20_000), "image[0]: the image cannot be read (400,000,000 pixels, more than"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_in_a_line(model, given, line):
    with pytest.raises(UserError) as caught:
        model.predict(given)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_bytes_beyond_the_limit_are_not_read(model, tmp_path):
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(MAX_BYTES + 100)
    for given in (str(large), large):
        with pytest.raises(UserError, match=r"67,108,865 bytes, more than the 67,108,864"):
            model.predict(given)
    with pytest.raises(UserError, match="more than the 64 MiB that are read of an image"):
        model.predict("A" * (MAX_BYTES * 3 // 2 + 1))


def refused(model: ServedClassifier, given: object) -> str:
    """The answer's line, of status 400."""
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException) as caught:
        model.predict(given)
    caught.value.message = f"as MLflow does: {given}"
    assert caught.value.get_http_status_code() == 400
    return json.loads(caught.value.serialize_as_json())["message"]


@pytest.mark.usefixtures("server")
def test_in_a_server_a_text_is_no_path(model, photo, tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    path.write_bytes(as_png(photo))
    monkeypatch.setattr(serving, "_read", None)
    for given in (str(path), pd.DataFrame({"image": [str(path)]}), [{"image": str(path)}]):
        line = refused(model, given)
        assert line.startswith("image[0]: text is no base64: found '/")
    (tmp_path / "abcd").write_bytes(as_png(photo))
    monkeypatch.chdir(tmp_path)  # a name that is base64 too
    assert refused(model, "abcd").startswith("image[0]: the image cannot be read (not a PNG")
    text = base64.b64encode(as_png(photo)).decode()
    assert model.predict([text])["class"].tolist() == [NAMES[1]]


@pytest.mark.usefixtures("server")
def test_in_a_server_bad_input_is_status_400_and_one_line(model, photo):
    bomb = base64.b64encode(png(20_000, 20_000)).decode()
    assert "400,000,000 pixels, more than the 100,000,000" in refused(model, bomb)
    assert refused(model, [None]) == "image[0]: found NoneType; expected base64 text"
    many = pd.DataFrame({"image": ["x"] * (MAX_SERVED + 1)})
    assert refused(model, many) == "257 images, more than the 256 of a request"


def test_outside_of_a_server_tables_may_be_long(model, photo):
    assert len(model.predict([photo] * (MAX_SERVED + 1))) == MAX_SERVED + 1


def test_a_server_is_known_by_what_mlflow_sets():
    """The signs are MLflow's own: a version that calls them otherwise must not pass here."""
    from mlflow.environment_variables import _MLFLOW_IS_IN_SERVING_ENVIRONMENT

    assert not in_server()
    server = Path(find_spec("mlflow").origin).parent / "pyfunc" / "scoring_server" / "__init__.py"
    assert (server.parent / "app.py").exists()
    code = server.read_text()
    assert "os.environ[_MLFLOW_IS_IN_SERVING_ENVIRONMENT.name] =" in code
    first, second = serving._SIGNS
    assert first == _MLFLOW_IS_IN_SERVING_ENVIRONMENT.name
    assert f'_SERVER_MODEL_PATH = "{second}"' in code
    assert "command_env[_SERVER_MODEL_PATH] =" in code


# The learner itself


@pytest.fixture(scope="module")
def learner(tmp_path_factory) -> ServedLearner:
    file = tmp_path_factory.mktemp("model") / "learner.pt"
    save_learner(tiny_given(), file)
    return serving_learner._load_pyfunc(str(file))


def task(per_class: int = 3, queries: int = 2) -> tuple[list[object], list[object], np.ndarray]:
    """Images and labels of a table, queries between the others; and classes of the queries."""
    photos, labels = strokes(per_class + queries, seed=3)
    order = np.random.default_rng(0).permutation(len(labels))
    unknown = np.tile([False] * per_class + [True] * queries, len(NAMES))
    cells = [None if unknown[i] else NAMES[labels[i]] for i in order]
    return [as_png(photos[i, 0]) for i in order], cells, labels[order][unknown[order]]


def test_a_learner_adapts_to_the_rows_with_a_label(learner):
    images, cells, truth = task()
    answer = learner.predict(pd.DataFrame({"image": images, "label": cells}))
    names = sorted(NAMES)
    assert list(answer) == ["class", "confidence"] + [f"p({name})" for name in names]
    assert answer["class"].tolist() == [NAMES[i] for i in truth]
    each = answer[[f"p({name})" for name in names]].to_numpy()
    assert np.allclose(each.sum(1), 1)
    assert np.array_equal(answer["confidence"], each.max(1))
    support = [i for i, cell in enumerate(cells) if cell]
    queries = [i for i, cell in enumerate(cells) if not cell]
    photos = serving.decode(images, 1, 14)
    x = tiny_given().photo_shape
    assert x == (1, 14, 14)
    y = torch.tensor([names.index(cells[i]) for i in support])
    float_of = lambda rows: torch.from_numpy(photos[rows]).float() / 255  # noqa: E731
    with torch.no_grad():
        logits = learner.given.learner.adapt(float_of(support), y)(float_of(queries))
    assert np.allclose(each, logits.softmax(1), atol=1e-5)


def test_a_learner_forgets_and_takes_any_table(learner):
    images, cells, _ = task()
    first = learner.predict(pd.DataFrame({"image": images, "label": cells}))
    empty = ["" if cell is None else f" {cell} " for cell in cells]
    records = [{"image": i, "label": c} for i, c in zip(images, cells, strict=True)]
    other = ["a" if i % 2 else "b" for i in range(len(images) - 1)]
    assert len(learner.predict({"image": images, "label": [*other, None]})) == 1
    for given in (
        pd.DataFrame({"image": images, "label": empty}),
        {"image": images, "label": [float("nan") if c is None else c for c in cells]},
        {"image": np.array(images, dtype=object), "label": np.array(cells, dtype=object)},
        records,
    ):
        pd.testing.assert_frame_equal(learner.predict(given), first)
    assert learner.predict({"image": images[:2], "label": ["a", "b"]}).shape == (0, 4)
    numbers = pd.DataFrame({"image": images[:3], "label": [0, 10, None]})  # pandas makes them 0.0
    assert list(learner.predict(numbers).columns[2:]) == ["p(0)", "p(10)"]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"image": ["x"]}, "columns: found 'image'; expected 'image' and 'label'"),
        ({"label": ["x"]}, "columns: found 'label'; expected 'image'"),
        ({"image": ["x"], "label": ["cat"]}, "label: found cat; two are needed"),
        ({"image": ["x"], "label": [None]}, "label: found none; two are needed"),
        ({"image": ["x", "y"], "label": ["cat", "dog"]}, "image[0]: neither a file nor base64"),
        ({"image": ["x", "y"], "label": ["cat"]}, "columns: expected image and label (All arrays"),
        ({"image": ["x", "y"], "label": [["cat"], "dog"]}, "label: found list; expected a name"),
        (5, "columns: expected image and label ("),
    ],
)  # fmt: skip
def test_bad_tables_are_a_line(learner, given, line):
    with pytest.raises(UserError) as caught:
        learner.predict(given)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("server")
def test_a_served_learner_reads_no_file_and_takes_so_many(learner, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(as_png(strokes(1)[0][0, 0]))
    rows = {"image": [str(path)] * 2, "label": ["a", "b"]}
    assert refused(learner, rows).startswith("image[0]: text is no base64")
    many = {"image": ["x"] * 257, "label": ["a", "b", *[None] * 255]}
    assert refused(learner, many) == "257 images, more than the 256 of a request"


def test_a_learner_of_a_number_of_ways_says_so(tmp_path):
    save_learner(
        tiny_given("learner=maml", "data.n_way=5", "data.train_n_way=5"), tmp_path / "learner.pt"
    )
    served = serving_learner._load_pyfunc(str(tmp_path / "learner.pt"))
    images, cells, _ = task(1, 1)
    with pytest.raises(UserError, match="3 classes, but this MAML was trained for 5"):
        served.predict({"image": images, "label": cells})


class Hostile:
    def __reduce__(self):
        return (Path("owned").touch, ())


@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))]
)
def test_a_pickle_in_place_of_the_file_is_not_run(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write({"photo_classifier": Hostile(), "learner": Hostile()}, tmp_path / "classifier.pt")
    with pytest.raises(UserError, match="not a readable classifier"):
        _load_pyfunc(str(tmp_path / "classifier.pt"))
    with pytest.raises(UserError, match="not a readable learner"):
        serving_learner._load_pyfunc(str(tmp_path / "classifier.pt"))
    assert not Path("owned").exists()


def test_one_kind_of_file_is_not_the_other(model, tmp_path):
    file = saved(model.classifier, tmp_path)
    with pytest.raises(UserError, match="was not written by this pipeline"):
        serving_learner._load_pyfunc(str(file))
