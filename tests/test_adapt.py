"""From a folder of photos to a classifier, end to end, with small networks."""

import csv
import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image

from pipeline import adapt, train
from pipeline.calibration import wilson_interval
from pipeline.classifier import PhotoClassifier
from pipeline.compose import compose_config
from pipeline.data.photos import read_support
from pipeline.errors import UserError
from pipeline.tracking import store
from pipeline.trained import given_learner
from tests.tiny import saved, strokes, tiny_classifier

COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (200, 40, 200), (40, 200, 200),
           (240, 240, 240), (10, 10, 10), (120, 120, 120), (250, 140, 20), (90, 40, 10), (180, 220, 120),
           (20, 80, 90), (130, 20, 60), (250, 190, 200), (60, 90, 20)]  # fmt: skip


def photo(label: int, number: int, side: int = 40) -> Image.Image:
    """Of a class: its colour, with noise of the photo's own."""
    noise = np.random.default_rng([label, number]).normal(0, 12, (side, side, 3))
    return Image.fromarray((np.array(COLOURS[label]) + noise).clip(0, 255).astype(np.uint8))


def photos(root: Path, counts: dict[str, int], first: int = 0) -> Path:
    """A folder a class; the i-th class has the i-th colour."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            photo(label, first + i).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a small network with weights in a file."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_efficientnet").state_dict(), path)
    return [
        "backbone=timm",
        "backbone.name=test_efficientnet",
        f"backbone.weights={path}",
        "image_size=32",
    ]


def adapted(*overrides: str) -> dict:
    overrides = [f"support={o}" if isinstance(o, Path) else o for o in overrides]
    return adapt.run(compose_config("adapt", overrides), overrides)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_five_photos_a_class(runs_folder, tmp_path, network, capsys):
    counts = dict.fromkeys(["ash", "birch", "cedar"], 5)
    support = photos(tmp_path / "support", counts)
    query = photos(tmp_path / "query", counts, first=100)
    out = tmp_path / "out"
    result = adapted(*network, support, f"query={query}", f"out={out}")
    assert result["query_accuracy"] == 1
    assert result["accuracy"] == 1
    written = rows(out / "predictions.csv")
    assert [row["class"] for row in written] == [row["true"] for row in written]
    assert all(
        math.isclose(sum(float(r[f"p({n})"]) for n in counts), 1, abs_tol=1e-4) for r in written
    )
    assert len(rows(out / "held_out.csv")) == 15
    assert "What the photos show" in (out / "predictions.html").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    low, high = wilson_interval(15 * 4 / 9, 15 * 4 / 9)  # five folds
    assert f"expected accuracy 100 % ({100 * low:.0f} to {100 * high:.0f} %): 15 of 15" in said
    assert "reject needs 19 photos left out, found 15" in said
    client = store.connect()
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["held_out/acc"] == 1
    assert run.data.tags["protocol"] == "inductive"
    figures = {a.path for a in client.list_artifacts(result["run_id"], "figures")}
    assert {"figures/embeddings.png", "figures/shots.png"} <= figures
    again = PhotoClassifier.load(out / "classifier.pt")
    other = read_support(query, 3, 32, True)
    given = again.predict(other.images).probabilities
    stored = np.array([[float(row[f"p({n})"]) for n in counts] for row in written])
    np.testing.assert_allclose(given, stored, atol=1e-5)


def test_uneven_numbers_of_photos_and_odd_files(runs_folder, tmp_path, network, capsys):
    """1, 2 and 7 photos; one in CMYK, one turned by EXIF, one that is none."""
    support = photos(tmp_path / "support", {"one": 1, "seven": 7, "two": 2})
    photo(1, 50).convert("CMYK").save(support / "seven" / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(2, 50).save(support / "two" / "turned.jpg", exif=exif)
    (support / "two" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no photo")
    result = adapted(*network, support, f"query={support}", f"out={tmp_path / 'out'}")
    assert len(rows(tmp_path / "out" / "held_out.csv")) == 11  # all but the only one
    assert result["query_accuracy"] == 1
    said = capsys.readouterr().out
    assert "12 of the photos to classify are among those it was made from" in said
    assert "copies of others" not in said
    assert said.count("broken.jpg") == 2  # as support, as query
    assert "3 classes, 12 photos" in said


@pytest.mark.parametrize("classes", [2, 15])
def test_few_and_many_classes(runs_folder, tmp_path, network, classes):
    counts = {f"class {i:02}": 3 for i in range(classes)}
    support = photos(tmp_path / "support", counts)
    query = photos(tmp_path / "query", counts, first=10)
    result = adapted(*network, support, f"query={query}")
    assert result["query_accuracy"] >= 0.9
    assert result["out"] == runs_folder / "classifiers" / result["run_id"]


def test_other_files_in_out_stay_there_and_names_are_no_markup(
    runs_folder, tmp_path, network, capsys
):
    photos(tmp_path / "in", {"a": 2, "b": 1})
    lines = ["path,label", "a/0.png,[/b]", "a/1.png,[/b]", "b/0.png,[red]"]
    (tmp_path / "in" / "labels.csv").write_text("\n".join(lines))
    (tmp_path / "in" / "predictions.csv").write_text("of an earlier call")
    given = f"support={tmp_path / 'in' / 'labels.csv'}"
    first = adapted(*network, given, f"out={tmp_path / 'in'}")
    said = capsys.readouterr().out
    assert "unknown for classes of one photo, which cannot be left out: [red]" in said

    def tracked(result: dict) -> list[str]:
        found = store.connect().list_artifacts(result["run_id"], "predictions")
        return sorted(Path(each.path).name for each in found)

    assert tracked(first) == ["held_out.csv"]
    result = adapted(*network, given, f"query={tmp_path / 'in' / 'a'}", f"out={tmp_path / 'in'}")
    assert "[/b]" in capsys.readouterr().out
    assert tracked(result) == ["held_out.csv", "predictions.csv", "predictions.html"]


def test_a_folder_that_cannot_be_written_is_told_before_the_work(runs_folder, tmp_path, network):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out: .*file cannot be written \(File exists\)"):
        adapted(*network, tmp_path / "no photos here", f"out={tmp_path / 'file'}")


def test_copies_are_told(runs_folder, tmp_path, network, capsys):
    support = photos(tmp_path / "support", {"a": 2, "b": 2})
    photo(0, 0).save(support / "a" / "again.png")
    adapted(*network, support)
    assert "1 of its photos are copies of others" in capsys.readouterr().out


def test_one_photo_a_class_has_no_estimate(runs_folder, tmp_path, network, capsys):
    support = photos(tmp_path / "support", {"a": 1, "b": 1})
    result = adapted(*network, support, f"query={photos(tmp_path / 'q', {'x': 2})}")
    assert math.isnan(result["accuracy"])
    assert "query_accuracy" not in result
    assert "expected accuracy unknown: no class has two photos" in capsys.readouterr().out


def test_what_looks_like_none_is_said_to(runs_folder, tmp_path, network):
    counts = dict.fromkeys("abcd", 8)
    support = photos(tmp_path / "support", counts)
    query = tmp_path / "query"
    query.mkdir()
    for label in range(6):  # two of them of no class
        for i in range(10):
            photo(label, 100 + i).save(query / f"{label}_{i}.png")
    adapted(*network, support, f"query={query}", f"out={tmp_path / 'out'}")
    found = pd.read_csv(tmp_path / "out" / "predictions.csv")
    none = found["looks_like_none"].groupby(found["path"].str.extract(r"(\d)_\d+")[0]).mean()
    assert none[["4", "5"]].min() >= 0.9
    assert none[["0", "1", "2", "3"]].mean() <= 0.2


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory, fresh_database):
    """A ProtoNet and a MAML for 3 classes, trained for two steps."""
    import shutil

    folder = tmp_path_factory.mktemp("tiny")
    shutil.copy(fresh_database, folder)
    tree = photos(folder / "photos", {f"{i:02}": 6 for i in range(16)})
    common = [
        "data=image_folder", f"data.root={tree}", "data.image_size=16", "data.n_way=3",
        "data.n_query=2", "data.val_episodes=2", "data.test_episodes=2", "data.batches_per_epoch=2",
        "trainer.max_steps=2", "backbone.width=8", "test=false", f"+data.cache_dir={folder}",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(store, "MLRUNS", folder)
        ids = {
            name: train.run(compose_config("train", [*common, f"learner={name}"]))["run_id"]
            for name in ("protonet", "maml")
        }
    return folder, ids


@pytest.mark.parametrize("name", ["protonet", "maml"])
def test_a_trained_run(tiny_runs, monkeypatch, tmp_path, name, capsys):
    folder, ids = tiny_runs
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(store, "MLRUNS", folder)
    support = photos(tmp_path / "support", dict.fromkeys("abc", 3))
    result = adapted(f"run={ids[name]}", support, f"query={support}", f"out={tmp_path / 'out'}")
    said = capsys.readouterr().out
    figures = {a.path for a in store.connect().list_artifacts(result["run_id"], "figures")}
    assert ("figures/inner_steps.png" in figures) == (name == "maml")
    assert ("transductive: what is said of a photo" in said) == (name == "maml")
    support = photos(tmp_path / "four", dict.fromkeys("abcd", 2))
    if name == "maml":
        with pytest.raises(
            UserError, match=r"n_way: 4 classes, but this MAML was trained for 3; an"
        ):
            adapted(f"run={ids[name]}", support)
        with pytest.raises(UserError, match=r"head: works on embeddings, but the run is of MAML"):
            adapted(f"run={ids[name]}", support, "head=cosine")
    else:
        assert adapted(f"run={ids[name]}", support)["accuracy"] >= 0
        out = adapted(f"run={ids[name]}", support, "head=linear_probe", f"out={tmp_path / 'h'}")[
            "out"
        ]
        assert PhotoClassifier.load(out / "classifier.pt").learner.label == "ProtoNet + LinearProbe"
        with pytest.raises(UserError, match=r"head.features: CL2N needs the mean embedding"):
            adapted(f"run={ids[name]}", support, "head=simple_shot")
    with pytest.raises(UserError, match=r"image_size: found 32; a run keeps that of its training"):
        adapted(f"run={ids[name]}", support, "image_size=32")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run=a", "checkpoint=b"], "run, checkpoint: found both"),
        (["run=nobody"], "run: no run 'nobody'"),
        (["checkpoint=none.ckpt"], "checkpoint: no file none.ckpt"),
        (["support=nowhere"], "support=nowhere: not found"),
        (["query=nowhere"], "query=nowhere: not found"),
        (["reject=2"], "reject: found 2; .*less than 1"),
        (["reject=often"], "reject: found 'often'"),
        (["image_size=4"], "image_size: found 4"),
        (["backbone=conv4"], "backbone.weights: found null; without a run"),
        (["+backbone.depth=3"], "backbone.depth: unknown key"),
        (["name="], "name: found ''"),
    ],
)
def test_bad_input(runs_folder, tmp_path, network, overrides, said):
    support = photos(tmp_path / "support", {"a": 2, "b": 2})
    plain = [] if overrides[0].split("=")[0] in ("run", "checkpoint", "backbone") else network
    cfg = compose_config("adapt", [*plain, f"support={support}", *overrides])
    with pytest.raises(UserError, match=said) as caught:
        adapt.run(cfg)
    assert "\n" not in str(caught.value)


class _Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE"],)


def test_a_hostile_classifier_or_checkpoint_is_refused(runs_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTILE", str(tmp_path / "it ran"))
    for name in ("a.pt", "b.ckpt"):
        (tmp_path / name).write_bytes(pickle.dumps({"pipeline": _Hostile()}))
    with pytest.raises(
        UserError, match=r"classifier: .*a.pt is not a readable .* nothing in it was run"
    ):
        PhotoClassifier.load(tmp_path / "a.pt")
    support = photos(tmp_path / "support", {"a": 2, "b": 2})
    with pytest.raises(UserError, match=r"checkpoint: .*b.ckpt is not a readable"):
        adapted(support, f"checkpoint={tmp_path / 'b.ckpt'}")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "target",
    ["shutil.copytree", "pipeline.checkpoints.shutil.copytree", "pipeline.data.files.scan"],
)
def test_a_configuration_that_calls_something_else_is_refused(target, tmp_path):
    """`weights_only=True` lets plain containers through, and Hydra calls what they name."""
    (tmp_path / "from").mkdir()
    file = saved(tiny_classifier(), tmp_path)
    content = torch.load(file, weights_only=True)
    call = {"_target_": target, "src": str(tmp_path / "from"), "dst": str(tmp_path / "to")}
    config = content["photo_classifier"]["config"]
    config["backbone"]["width"] = call
    torch.save(content | {"pipeline": {"config": config}}, file)  # also a checkpoint
    with pytest.raises(UserError, match=rf"names '{target}', which is no part .* nothing was run"):
        PhotoClassifier.load(file)
    with pytest.raises(UserError, match="which is no part"):
        adapted(f"support={tmp_path}", f"checkpoint={file}")
    assert not (tmp_path / "to").exists()


def test_the_temperature_is_that_of_photos_left_out(tmp_path, network):
    support = read_support(photos(tmp_path / "s", dict.fromkeys("ab", 6)), 3, 32, True)
    cfg = compose_config("adapt", [*network, "support=none"])
    both = torch.from_numpy(support.images), torch.from_numpy(support.labels)
    classifier = PhotoClassifier(given_learner(cfg), *both, support.class_names)
    before = classifier(both[0])
    estimate = classifier.calibrate()
    torch.testing.assert_close(classifier(both[0]) * classifier.temperature, before)
    assert len(classifier.known_scores) == estimate.photos == 12
    assert classifier.can_reject is (1 / 13 <= 0.05)
    classifier.reject = 0.1
    said = classifier.predict(support.images)
    assert classifier.can_reject
    assert (said.known >= 1 / 13).all()
    assert json.dumps(classifier.provenance)


def test_a_transductive_learner_sees_all_classes_in_each_part(monkeypatch):
    """Folders come class by class; what is said of a photo must not depend on that."""
    monkeypatch.setattr("pipeline.classifier.BATCH", 8)
    classifier = tiny_classifier("backbone.norm=batch_stats")
    assert classifier.learner.protocol == "transductive"
    queries, labels = strokes(8, seed=5)
    queries[:, :, 0, 0] = labels[:, None]  # to know them by
    seen, forward = [], PhotoClassifier.forward

    def watched(self, photos):
        seen.append(photos[:, 0, 0, 0])
        return forward(self, photos)

    monkeypatch.setattr(PhotoClassifier, "forward", watched)
    said = classifier.predict(queries)
    assert [len(part) for part in seen] == [8, 8, 8]
    assert all(len(part.unique()) == 3 for part in seen)
    assert (said.labels == labels).mean() > 0.8, "in the order that they came"


def test_logits_that_are_not_finite_get_one_line():
    classifier = tiny_classifier()
    next(classifier.learner.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"ProtoNet: its logits .* are not finite"):
        classifier.calibrate()


def test_a_damaged_classifier_is_a_line(tmp_path, network):
    support = read_support(photos(tmp_path / "s", dict.fromkeys("ab", 2)), 3, 32, True)
    cfg = compose_config("adapt", [*network, "support=none"])
    both = torch.from_numpy(support.images), torch.from_numpy(support.labels)
    PhotoClassifier(given_learner(cfg), *both, support.class_names).save(tmp_path / "c.pt")
    file = torch.load(tmp_path / "c.pt", weights_only=True)
    state = file["state_dict"]
    name = next(k for k in state if k.startswith("learner."))
    for damaged in (
        file | {"state_dict": {k: v for k, v in state.items() if k != name}},
        file | {"state_dict": state | {name: torch.zeros(2)}},
        {k: v for k, v in file.items() if k != "state_dict"},
    ):
        torch.save(damaged, tmp_path / "d.pt")
        with pytest.raises(UserError, match=r"classifier: .*d.pt is damaged \(") as caught:
            PhotoClassifier.load(tmp_path / "d.pt")
        assert "\n" not in str(caught.value)
