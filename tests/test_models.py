"""Classifiers as MLflow models: in a run, in the registry, loaded, served."""

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from pipeline import config, register, serving_learner
from pipeline.classifier import PhotoClassifier
from pipeline.compose import compose_config
from pipeline.errors import UserError
from pipeline.tracking import models, store
from pipeline.tracking.models import log_photo_classifier
from pipeline.tracking.run import tracked_run
from tests.tiny import NAMES, saved, strokes, tiny_classifier, tiny_given

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def classifier() -> PhotoClassifier:
    return tiny_classifier()


def logged(classifier, folder, name=None, alias="champion"):
    """The URI of the model and the id of its run."""
    estimate = classifier.calibrate()
    with tracked_run("photo-classifiers", "tiny", {"a": 1}, {}, None) as run:
        file = saved(classifier, folder)
        return log_photo_classifier(run, classifier, file, estimate, name, alias), run.run_id


def test_a_run_has_a_model_without_a_pickle(classifier, runs_folder, tmp_path):
    uri, run_id = logged(classifier, tmp_path)
    client = store.connect()
    model = client.get_logged_model(uri.removeprefix("models:/"))
    assert (model.status, model.source_run_id, model.name) == ("READY", run_id, "classifier")
    outputs = client.get_run(run_id).outputs.model_outputs
    assert [each.model_id for each in outputs] == [model.model_id]
    folder = Path(model.artifact_location)
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {"MLmodel", "requirements.txt", "data/classifier.pt", "code/pipeline/serving.py",
            "input_example.json", "serving_input_example.json"} <= files  # fmt: skip
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pyc"))]
    torch.load(folder / "data/classifier.pt", weights_only=True)
    pins = (folder / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in pins
    assert all("==" in pin for pin in pins)
    assert client.search_registered_models() == []
    example = json.loads((folder / "serving_input_example.json").read_text())
    text = example["dataframe_split"]["data"][0][0]
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    assert np.abs(seen.astype(int) - classifier.support[0, 0].numpy()).mean() < 8  # a JPEG


def test_a_name_makes_versions_and_the_newest_is_the_champion(classifier, runs_folder, tmp_path):
    ids = []
    for version in ("1", "2"):
        uri, run_id = logged(classifier, tmp_path, "shapes & more")
        assert uri == f"models:/shapes & more/{version}"
        ids.append(run_id)
    client = store.connect()
    champion = client.get_model_version_by_alias("shapes & more", "champion")
    assert (champion.version, champion.run_id, champion.status) in [
        ("2", ids[1], "READY"),
        (2, ids[1], "READY"),
    ]
    tags = champion.tags
    assert {k: tags[k] for k in ("learner", "backbone", "protocol", "run", "source_run", "classes")} == {
        "learner": "ProtoNet", "backbone": "tiny", "protocol": "inductive", "run": "a" * 32,
        "source_run": ids[1], "classes": "3",
    }  # fmt: skip
    estimate = classifier.calibrate()
    assert float(tags["held_out_accuracy"]) == round(estimate.accuracy, 4)
    assert champion.description.startswith("disc, ring & <dot>, confidence: ProtoNet tiny, adapted")
    assert "of 24 photos" in champion.description.lower()
    logged(classifier, tmp_path, "shapes & more", alias=None)
    assert str(client.get_model_version_by_alias("shapes & more", "champion").version) == "2"


def test_what_the_registry_refuses_costs_a_line(classifier, runs_folder, tmp_path, capsys):
    uri, run_id = logged(classifier, tmp_path, "a/b")
    assert uri is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tracking: MLflow refused model (")
    assert "'a/b'" in lines[0]
    assert store.connect().get_run(run_id).info.status == "FINISHED"
    assert not (runs_folder / "unsent").exists()


def test_a_model_that_cannot_be_built_costs_a_line(
    classifier, runs_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(models, "_NEEDED", ("no-such-package",))
    uri, run_id = logged(classifier, tmp_path)
    assert uri is None
    assert capsys.readouterr().err == (
        "tracking: the classifier is not logged as a model (No package metadata was found for "
        "no-such-package)\n"
    )
    assert store.connect().get_run(run_id).info.status == "FINISHED"


def test_a_store_that_is_away_gets_the_model_later(
    classifier, runs_folder, tmp_path, capsys, monkeypatch
):
    def away(*arguments, **options):
        raise OSError("connection lost")

    from mlflow import MlflowClient

    with monkeypatch.context() as patch:
        with tracked_run("photo-classifiers", "tiny", {}, {}, None) as run:
            patch.setattr(MlflowClient, "create_logged_model", away)
            patch.setattr(MlflowClient, "get_run", away)
            file = saved(classifier, tmp_path)
            assert log_photo_classifier(run, classifier, file, None, "shapes") is None
        assert "does not answer (connection lost)" in capsys.readouterr().err
        assert list((runs_folder / "unsent" / run.run_id).glob("*/classifier/MLmodel"))
    with tracked_run("photo-classifiers", "next", {}, {}, None):
        pass
    client = store.connect()
    champion = client.get_model_version_by_alias("shapes", "champion")
    assert champion.run_id == run.run_id
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert not list((runs_folder / "unsent").iterdir())


def test_a_learner_is_registered_too(runs_folder, tmp_path, monkeypatch, capsys):
    """From a checkpoint file: its model is in a run of its own, and adapts as loaded."""
    given = tiny_given()
    checkpoint = {"state_dict": given.learner.state_dict(), "global_step": 7}
    checkpoint |= {
        "pipeline": {"config": OmegaConf.to_container(given.cfg, resolve=True), "seen": []}
    }
    torch.save(checkpoint, tmp_path / "best.ckpt")
    cfg = compose_config("register", [f"checkpoint={tmp_path / 'best.ckpt'}", "name=learner"])
    assert register.run(cfg) == "models:/learner/1"
    assert 'load_model("models:/learner@champion")' in capsys.readouterr().out
    client = store.connect()
    version = client.get_model_version_by_alias("learner", "champion")
    assert version.tags["learner"] == "ProtoNet"
    assert version.tags["checkpoint"] == "best.ckpt"
    folder = Path(client.get_model_version_download_uri("learner", "1"))
    example = json.loads((folder / "input_example.json").read_text())
    served = serving_learner._load_pyfunc(str(folder / "data" / "learner.pt"))
    answer = served.predict(pd.DataFrame(example["data"], columns=example["columns"]))
    assert answer["class"].tolist() == ["black"]
    cfg.name = "a:b"
    monkeypatch.setattr(config, "check_root", lambda *a: None)
    with pytest.raises(UserError, match="name: a:b is not registered; the line above says why"):
        register.run(cfg)


@pytest.mark.slow
def test_the_versions_that_serving_needs_are_all_stated():
    """Whatever of pyproject.toml is imported to load and run a model is among the requirements."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    ours = {re.split("[>=<]", line)[0] for line in project["dependencies"]}
    modules = {name.replace("-", "_"): name for name in ours} | {
        "hydra": "hydra-core",
        "PIL": "pillow",
    }
    code = (
        "import sys, pipeline.serving_learner; print(*{m.partition('.')[0] for m in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    used = {modules[m] for m in done.stdout.split() if m in modules}
    assert used - {"matplotlib"} <= set(
        models._NEEDED
    )  # torchmetrics draws with it, if it is there
    assert set(models._NEEDED) <= used | {"mlflow", "torchvision"}


# Other processes


def elsewhere(folder: Path, runs: Path) -> dict[str, str]:
    """The environment of a process that knows nothing of this checkout."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIPELINE_MLRUNS")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"MLFLOW_TRACKING_URI": f"sqlite:///{runs / 'mlflow.db'}", "PATH": path}
    return {**kept, **own, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def png_text(photo: np.ndarray) -> str:
    Image.fromarray(photo).save(file := io.BytesIO(), "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.slow
def test_a_fresh_process_loads_the_champion(classifier, runs_folder, tmp_path):
    logged(classifier, tmp_path, "shapes")
    photos, labels = strokes(2, seed=9)
    code = (
        "import sys, json, pandas as pd, mlflow\n"
        "model = mlflow.pyfunc.load_model('models:/shapes@champion')\n"
        "import pipeline\n"
        "rows = model.predict(pd.DataFrame({'image': json.load(sys.stdin)}))\n"
        "print(pipeline.__file__)\n"
        "print(rows.to_json())"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        input=json.dumps([png_text(p[0]) for p in photos]),
        cwd=tmp_path, env=elsewhere(tmp_path, runs_folder), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    where, table = done.stdout.splitlines()[-2:]
    assert Path(where).is_relative_to(runs_folder / "artifacts")
    rows = pd.read_json(io.StringIO(table))
    expected = classifier.predict(photos)
    assert (
        rows["class"].tolist() == [NAMES[i] for i in expected.labels] == [NAMES[i] for i in labels]
    )
    each = rows[[f"p({name})" for name in NAMES]].to_numpy()
    assert np.allclose(each, expected.probabilities, atol=1e-5)


def asked(port: int, body: object) -> tuple[int, dict]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def served(classifier, runs_folder, tmp_path):
    """The port of `mlflow models serve` on the second version of a model."""
    logged(classifier, tmp_path, "shapes")
    logged(classifier, tmp_path, "shapes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/shapes@champion"]
    command += ["--env-manager", "local", "--port", str(port)]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        command, cwd=tmp_path, env=elsewhere(tmp_path, runs_folder), stdout=log, stderr=log
    )
    try:
        for _ in range(240):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield port
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.mark.slow
def test_a_server_answers_and_reads_no_file(served, classifier, tmp_path):
    photos, labels = strokes(1, seed=9)
    texts = [png_text(p[0]) for p in photos]
    expected = classifier.predict(photos)
    for body in (
        {"dataframe_split": {"columns": ["image"], "data": [[t] for t in texts]}},
        {"dataframe_records": [{"image": f"data:image/png;base64,{t}"} for t in texts]},
        {"inputs": texts},
        {"instances": [{"image": t} for t in texts]},
    ):
        status, answer = asked(served, body)
        assert status == 200, answer
        rows = pd.DataFrame(answer["predictions"])
        assert rows["class"].tolist() == [NAMES[i] for i in labels]
        each = rows[[f"p({name})" for name in NAMES]].to_numpy()
        assert np.allclose(each, expected.probabilities, atol=1e-5)
    file = tmp_path / "photo.png"
    file.write_bytes(base64.b64decode(texts[0]))
    status, answer = asked(served, {"inputs": [str(file)]})
    assert status == 400
    assert answer["message"].startswith("image[0]: text is no base64: found '/")
    status, answer = asked(served, {"inputs": ["aGVsbG8="] * 257})
    assert (status, answer["message"]) == (400, "257 images, more than the 256 of a request")
