"""Classifiers as ONNX and torch.export files, equal to the module."""

import builtins
import json
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline import onnx_export
from pipeline.classifier import PhotoClassifier
from pipeline.errors import UserError
from pipeline.onnx_export import TOLERANCE, export_onnx, export_program, reject_below
from tests.tiny import NAMES, SIDE, strokes, tiny_classifier

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def classifier() -> PhotoClassifier:
    return tiny_classifier()


@pytest.fixture(scope="module")
def written(classifier, tmp_path_factory) -> tuple[Path, float]:
    path = tmp_path_factory.mktemp("onnx") / "classifier.onnx"
    return path, export_onnx(classifier, path)


def session(path: Path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_the_file_says_what_the_module_says(classifier, written):
    path, difference = written
    assert difference <= TOLERANCE
    own = session(path)
    assert [(i.name, i.type) for i in own.get_inputs()] == [("photos", "tensor(uint8)")]
    assert [o.name for o in own.get_outputs()] == ["probabilities", "score"]
    for per_class in (1, 7):
        photos, _ = strokes(per_class, seed=4)
        probabilities, score = own.run(None, {"photos": photos})
        said = classifier.predict(photos)
        assert np.abs(probabilities - said.probabilities).max() <= TOLERANCE
        with torch.inference_mode():
            assert np.allclose(score, classifier(torch.from_numpy(photos)).amax(1), 1e-4, 1e-4)
    one = own.run(None, {"photos": strokes(1)[0][:1]})
    assert one[0].shape == (1, 3)


def test_neither_file_holds_a_photo(classifier, written, tmp_path):
    assert export_program(classifier, tmp_path / "classifier.pt2") <= TOLERANCE
    photo = classifier.support[3].numpy().tobytes()
    with ZipFile(tmp_path / "classifier.pt2") as archive:
        parts = [archive.read(name) for name in archive.namelist()]
    assert not any(photo in part for part in [written[0].read_bytes(), *parts])
    classifier.save(tmp_path / "classifier.pt")
    with ZipFile(tmp_path / "classifier.pt") as archive:
        assert any(photo in archive.read(name) for name in archive.namelist())


def test_the_file_knows_names_temperature_and_threshold(classifier, written):
    found = session(written[0]).get_modelmeta().custom_metadata_map
    assert tuple(json.loads(found["class_names"])) == NAMES
    assert float(found["temperature"]) == classifier.temperature
    assert f"cropped to {SIDE}x{SIDE}" in found["preprocessing"]
    assert found["learner"] == "ProtoNet"
    photos = np.concatenate([strokes(8, seed=2)[0], np.zeros((5, 1, SIDE, SIDE), np.uint8)])
    score = session(written[0]).run(None, {"photos": photos})[1]
    said = classifier.predict(photos)
    assert 0 < said.rejected.sum() < len(photos)
    assert np.array_equal(score < float(found["reject_below"]), said.rejected)


@pytest.mark.parametrize("known", [0, 5, 18, 19, 20, 60])
@pytest.mark.parametrize("ties", [False, True])
def test_the_threshold_is_where_predict_begins_to_reject(known, ties, monkeypatch):
    monkeypatch.setattr("pipeline.classifier.BATCH", 999)
    classifier = tiny_classifier()
    scores = torch.randn(known, generator=torch.Generator().manual_seed(0))
    classifier.known_scores = (scores.round() if ties else scores).sort().values
    around = torch.cat(
        [classifier.known_scores, classifier.known_scores - 1e-4, torch.tensor([-99.0, 99.0])]
    )
    classifier.forward = lambda photos: around[:, None].expand(-1, 3)
    rejected = classifier.predict(np.zeros((len(around), 1, SIDE, SIDE), np.uint8)).rejected
    below = reject_below(classifier)
    assert rejected.tolist() == [below is not None and float(s) < below for s in around]
    assert rejected.any() == (known >= 19)


@pytest.mark.slow
def test_the_program_runs_without_this_package(classifier, tmp_path):
    path = tmp_path / "classifier.pt2"
    assert export_program(classifier, path) <= TOLERANCE
    photos, _ = strokes(1, seed=4)
    np.save(tmp_path / "photos.npy", photos)
    code = (
        "import sys, numpy as np, torch\n"
        "module = torch.export.load('classifier.pt2').module()\n"
        "p, score = module(torch.from_numpy(np.load('photos.npy')))\n"
        "assert 'pipeline' not in sys.modules\n"
        "np.save('p.npy', p.numpy())"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    said = classifier.predict(photos).probabilities
    assert np.abs(np.load(tmp_path / "p.npy") - said).max() <= TOLERANCE


@pytest.mark.slow
def test_resizing_is_in_the_file(tmp_path):
    """A network of timm that takes larger and smaller photos than it is given; grey ones too."""
    for channels, size in ((3, 32), (1, 8)):
        network = ["backbone=timm", "backbone.name=test_vit", "backbone.weights=null"]
        network += [f"backbone.resize_to={size if size > 8 else 160}", "backbone.trained_stages=0"]
        classifier = tiny_classifier("learner=frozen", *network, channels=channels)
        assert export_onnx(classifier, tmp_path / "x.onnx") <= TOLERANCE


def test_what_smooths_before_it_shrinks_is_equal():
    """Opset 18's Resize against PyTorch's, on which the networks' own resizing rests."""
    import onnxruntime

    class Resize(torch.nn.Module):
        def forward(self, x):
            return F.interpolate(x.float(), size=(9, 9), mode="bilinear", antialias=True)

    x = torch.randint(0, 256, (2, 3, 30, 30), dtype=torch.uint8)
    with onnx_export._quiet("ONNX"):
        program = torch.onnx.export(Resize(), (x,), dynamo=True, opset_version=18, verbose=False)
    data = program.model_proto.SerializeToString()
    (found,) = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(
        None, {program.model_proto.graph.input[0].name: x.numpy()}
    )
    assert np.allclose(found, Resize()(x), atol=0.01)  # of 255
    plain = F.interpolate(x.float(), size=(9, 9), mode="bilinear")
    assert np.abs(found - plain.numpy()).max() > 10


@pytest.mark.parametrize(
    ("learner", "line"),
    [
        (
            "maml",
            "export: MAML (transductive) cannot be exported; learners that compare embeddings,",
        ),
        ("feat", "export: FEAT classifies by vmap, which cannot be exported"),
        ("relation_net", "export: torch.export cannot express this learner ("),
        pytest.param(
            "matching_net",
            "export: ONNX cannot express this learner (No ONNX function found for",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_exported_is_told_in_a_line_and_stays_whole(learner, line, tmp_path):
    classifier = tiny_classifier(f"learner={learner}", "data.n_way=3", "data.train_n_way=3")
    photos, _ = strokes(2, seed=4)
    before = classifier.predict(photos).probabilities
    with pytest.raises(UserError) as caught:
        export_onnx(classifier, tmp_path / "x.onnx")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    torch.rand(2)  # a failure must not leave vmap's state behind
    assert np.array_equal(classifier.predict(photos).probabilities, before)


def test_a_file_that_differs_is_not_kept(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    for export, name in ((export_onnx, "x.onnx"), (export_program, "x.pt2")):
        with pytest.raises(UserError, match=r"file would differ by .*; not kept"):
            export(classifier, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_a_line_says_which_extra(classifier, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments):
        if name == "onnxruntime":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install '\.\[onnx\]' \(onnxruntime is missing\)"):
        export_onnx(classifier, tmp_path / "x.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    "learner",
    ["baseline", "baseline_plus_plus", "frozen", "leo", "linear_probe", "lr_d2", "matching_net_basic",
     "meta_baseline", "metaoptnet", "metaoptnet_ridge", "pixel_centroid", "protonet_cosine", "r2d2",
     "simple_shot"],
)  # fmt: skip
def test_learners_that_can_be_exported(learner, tmp_path):
    classifier = tiny_classifier(f"learner={learner}", "data.n_way=3", "data.train_n_way=3")
    assert export_onnx(classifier, tmp_path / "x.onnx") <= TOLERANCE
