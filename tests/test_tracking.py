"""Tracking: what arrives, how runs are closed, and what happens when the store goes away."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from omegaconf import OmegaConf

from pipeline import ui
from pipeline.errors import UserError
from pipeline.tracking import outbox, store
from pipeline.tracking import run as tracking
from tests.conftest import stored_table

CONFIG = {"learner": {"inner_lr": 0.4, "betas": [0.0, 0.9]}, "seed": 3, "nothing": {}}


def tracked(**changes):
    options = {"experiment": "e", "name": "n", "config": CONFIG, "tags": {"a": 1}, "resume": None}
    return tracking.tracked_run(**(options | changes))


def test_flatten():
    flat = tracking.flatten(CONFIG)
    assert flat == {"learner.inner_lr": 0.4, "learner.betas": [0.0, 0.9], "seed": 3, "nothing": {}}


@pytest.mark.usefixtures("runs_folder")
def test_everything_arrives():
    with tracked() as run:
        run.log_metrics({"val/acc": np.float32(0.5)}, step=3)
        run.log_metrics({"val/acc": 0.75}, step=4)
        run.log_table(
            pd.DataFrame({"x": [1.5, None], "y": ["a", "b"]}), "results.csv", "results.json"
        )
        run.log_dataset("glyphs", "f" * 64, "Glyphs", "training", {"images": 7})
        (run.checkpoint_dir).mkdir(parents=True)
        (run.checkpoint_dir / "best.ckpt").write_text("weights")
    client = store.connect()
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params["learner.betas"] == "[0.0, 0.9]"
    assert stored.data.tags["a"] == "1"
    assert [(m.step, m.value) for m in client.get_metric_history(run.run_id, "val/acc")] == [
        (3, 0.5),
        (4, 0.75),
    ]
    assert stored_table(client, run.run_id)["y"].tolist() == ["a", "b"]
    assert stored.inputs.dataset_inputs[0].dataset.digest == "f" * 36
    assert store.find_checkpoint(run.run_id, "best").read_text() == "weights"
    assert not run.checkpoint_dir.exists()


@pytest.mark.usefixtures("runs_folder")
def test_system_metrics_are_sampled(monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with tracked() as run:
        time.sleep(1.5)
    metrics = store.connect().get_run(run.run_id).data.metrics
    assert metrics["system/system_memory_usage_megabytes"] > 0


@pytest.mark.usefixtures("runs_folder")
def test_system_metrics_outlive_a_lost_server(monkeypatch):
    def lost(*args: object) -> None:
        raise ConnectionError("unplugged")

    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with tracked() as run:
        with monkeypatch.context() as patch:
            patch.setattr("mlflow.MlflowClient.get_run", lost)  # MLflow's own loop ends by this
            patch.setattr("mlflow.MlflowClient.log_batch", lost)
            time.sleep(0.7)
        time.sleep(0.7)
    client = store.connect()
    history = client.get_metric_history(run.run_id, "system/cpu_utilization_percentage")
    steps = [m.step for m in history]
    assert len(steps) >= 3
    assert steps == list(range(len(steps)))


@pytest.mark.usefixtures("runs_folder")
def test_without_psutil_there_are_no_system_metrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow.system_metrics.system_metrics_monitor", None)
    with tracked() as run:
        run.log_metrics({"x": 1}, 0)
    stored = store.connect().get_run(run.run_id)
    assert (stored.info.status, stored.data.metrics) == ("FINISHED", {"x": 1})


@pytest.mark.usefixtures("runs_folder")
def test_what_mlflow_refuses_is_said_and_stops_nothing(capsys):
    with tracked(tags={"bad\nkey": 1}) as run:
        run.log_metrics({"x": 1}, 0)
    assert "tracking: MLflow refused tags (Invalid value" in capsys.readouterr().err
    stored = store.connect().get_run(run.run_id)
    assert (stored.info.status, stored.data.metrics["x"]) == ("FINISHED", 1)


@pytest.mark.usefixtures("runs_folder")
@pytest.mark.parametrize("away", [False, True], ids=["at once", "when it is back"])
def test_checkpoints_that_mlflow_refuses_stay_here(away, monkeypatch):
    def refuse(*_: object) -> None:
        raise MlflowException("no such file", error_code=INVALID_PARAMETER_VALUE)

    with tracked() as run:
        run.checkpoint_dir.mkdir(parents=True)
        (run.checkpoint_dir / "best.ckpt").write_text("weights")
        monkeypatch.setattr("mlflow.MlflowClient.log_artifact", refuse)
        if away:
            run._outbox.client = Unreliable(run._outbox.client)
            run._outbox.client.plugged = False
            run.log_file(run.checkpoint_dir / "best.ckpt", "checkpoints")
            run._outbox.client.plugged = True
    assert store.connect().get_run(run.run_id).info.status == "FINISHED"
    assert (run.checkpoint_dir / "best.ckpt").read_text() == "weights"


@pytest.mark.usefixtures("runs_folder")
@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_how_a_run_ends(error, status):
    with pytest.raises(error), tracked() as run:
        raise error
    assert store.connect().get_run(run.run_id).info.status == status


@pytest.mark.usefixtures("runs_folder")
def test_sigterm_kills_the_run_and_keeps_its_checkpoints():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), tracked() as run:  # noqa: PT012  # the block is the run
        run.checkpoint_dir.mkdir(parents=True)
        (run.checkpoint_dir / "last.ckpt").write_text("weights")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == before
    assert store.connect().get_run(run.run_id).info.status == "KILLED"
    assert (run.checkpoint_dir / "last.ckpt").exists()
    with tracked(resume=run.run_id) as again:
        assert store.connect().get_run(run.run_id).info.status == "RUNNING"
    assert again.run_id == run.run_id


class Unreliable:
    """A client whose server can be unplugged."""

    def __init__(self, client):
        self.client, self.plugged, self.calls = client, True, 0

    def __getattr__(self, name):
        if not self.plugged:
            self.calls += 1
            raise ConnectionError("unplugged")
        return getattr(self.client, name)


def test_a_lost_store_costs_nothing(runs_folder, capsys, monkeypatch, tmp_path):
    with tracked() as run:
        line = Unreliable(run._outbox.client)
        run._outbox.client = line
        run.log_metrics({"x": 0}, step=0)
        line.plugged = False
        for step in (1, 2, 3):
            run.log_metrics({"x": step}, step=step)
        run.log_table(pd.DataFrame({"x": [1]}), "results.csv", "results.json")
        (tmp_path / "picture.png").write_text("before")
        run.log_file(tmp_path / "picture.png", "figures")
        (tmp_path / "picture.png").write_text("changed since")
        assert line.calls == 1  # it is not asked again at every step
        err = capsys.readouterr().err
        assert err.count("does not answer (unplugged); training goes on") == 1
        assert (
            len((runs_folder / "unsent" / f"{run.run_id}.jsonl").read_text().splitlines()) == 1 + 6
        )
    client = store.connect()  # the block has ended, its server still away
    assert client.get_run(run.run_id).info.status == "RUNNING"
    assert [m.step for m in client.get_metric_history(run.run_id, "x")] == [0]

    monkeypatch.setattr(outbox, "_alive", lambda pid: False)  # as if in another process, later
    with tracked():
        pass
    assert f"sent 7 kept records of run {run.run_id}" in capsys.readouterr().err
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.run_id, "x")] == [0, 1, 2, 3]
    figure = client.download_artifacts(run.run_id, "figures/picture.png")
    assert Path(figure).read_text() == "before"
    assert stored_table(client, run.run_id)["x"].tolist() == [1]
    assert not list((runs_folder / "unsent").iterdir())


def test_what_a_kill_cut_off_does_not_hold_up_the_rest(runs_folder, monkeypatch, capsys):
    with tracked() as run:
        run._outbox.client = Unreliable(run._outbox.client)
        run._outbox.client.plugged = False
        run.log_metrics({"x": 1}, step=1)
        run.log_metrics({"x": 2}, step=2)
    kept = run._outbox.journal
    head, first, second, _status = kept.read_text().splitlines()
    refused = json.dumps({"kind": "metrics", "values": {"a:?b": 1.0}, "time": 1, "step": 0})
    kept.write_text("\n".join([head, first, refused, second, second[: len(second) // 2]]))
    empty = kept.with_name("0123456789abcdef.jsonl")
    empty.write_text("")
    monkeypatch.setattr(outbox, "_alive", lambda pid: False)
    capsys.readouterr()
    with tracked():
        pass
    said = capsys.readouterr().err
    assert "MLflow refused metrics (Invalid" in said
    assert "of run 0123456789abcdef" not in said  # nothing was in it
    assert f"sent 2 kept records of run {run.run_id}" in said
    history = store.connect().get_metric_history(run.run_id, "x")
    assert [m.value for m in history] == [1, 2]
    assert not list((runs_folder / "unsent").iterdir())


def test_a_resumed_run_takes_its_journal_over(runs_folder, capsys):
    with tracked() as run:
        run._outbox.client = Unreliable(run._outbox.client)
        run._outbox.client.plugged = False
        run.log_metrics({"x": 1}, step=1)
    with run._outbox.journal.open("a") as file:
        file.write('{"kind": "metr')  # killed here
    line = Unreliable(store.connect())
    line.plugged = False
    box = outbox.Outbox(line, run.run_id, store.tracking_uri(), runs_folder / "unsent")
    box.send({"kind": "metrics", "values": {"x": 2.0}, "time": 2, "step": 2})
    line.plugged = True
    box.send({"kind": "status", "status": "FINISHED", "time": 3}, now=True)
    assert "sent 3 kept records" in capsys.readouterr().err  # the first, its closing, the second
    history = store.connect().get_metric_history(run.run_id, "x")
    assert {m.value for m in history} == {1, 2}


@pytest.mark.usefixtures("runs_folder")
def test_a_store_that_comes_back_gets_all_of_it_in_order(monkeypatch):
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0)
    with tracked() as run:
        line = Unreliable(run._outbox.client)
        run._outbox.client = line
        line.plugged = False
        run.log_metrics({"x": 1}, step=1)
        line.plugged = True
        run.log_metrics({"x": 2}, step=2)
        assert not run._outbox.journal.exists()
    history = store.connect().get_metric_history(run.run_id, "x")
    assert [m.value for m in history] == [1, 2]


@pytest.mark.usefixtures("runs_folder")
def test_two_threads_lose_nothing_in_outages(monkeypatch):
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0)
    steps = range(40)

    def write(run: tracking.Run, key: str) -> None:
        for step in steps:
            run.log_metrics({key: step}, step)
            time.sleep(0.01)

    with tracked() as run:
        line = Unreliable(run._outbox.client)
        run._outbox.client = line
        threads = [threading.Thread(target=write, args=(run, key)) for key in "ab"]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            line.plugged = not line.plugged
            time.sleep(0.1)
        line.plugged = True
        for thread in threads:
            thread.join()
    client = store.connect()
    for key in "ab":
        assert [m.step for m in client.get_metric_history(run.run_id, key)] == list(steps)


def test_neither_store_nor_disk(runs_folder, capsys):
    with tracked() as run:
        run.checkpoint_dir.mkdir(parents=True)
        (run.checkpoint_dir / "last.ckpt").write_text("weights")
        run._outbox.client = Unreliable(run._outbox.client)
        run._outbox.client.plugged = False
        (runs_folder / "unsent").write_text("a file where the folder should be")
        run.log_metrics({"x": 1}, 0)
        run.log_metrics({"x": 2}, 1)
    assert capsys.readouterr().err.count("metrics lost, cannot be kept") == 1
    assert (run.checkpoint_dir / "last.ckpt").exists()  # FINISHED, but it never arrived


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(store, "MLRUNS", tmp_path / "file")
    with pytest.raises(UserError, match="file: cannot be written"):
        store.connect()


@pytest.mark.usefixtures("runs_folder")
@pytest.mark.parametrize(
    "uri",
    [
        "gopher://nowhere",
        "file:./mlruns",
        "http://127.0.0.1:1",
        "http://localhost:port",
        "sqlite:////dev/null/x.db",
        "sqlite:///{folder}/no.db",
    ],
)
def test_a_store_that_cannot_be_used(uri, tmp_path, monkeypatch):
    (tmp_path / "no.db").write_text("this is no database " * 200)
    uri = uri.format(folder=tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    start = time.monotonic()
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI: ") as caught:
        store.connect()
    assert time.monotonic() - start < 4
    assert uri in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_uri_that_ends_in_a_slash(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000/")
    assert store.tracking_uri() == "http://host:5000"


@pytest.mark.usefixtures("runs_folder")
def test_ui_refuses_a_port_that_it_cannot_have():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port: {port} is taken"):
            ui.run(OmegaConf.create({"port": port}))
    with pytest.raises(UserError, match="port: found 'abc', allowed are 1 to 65535"):
        ui.run(OmegaConf.create({"port": "abc"}))


@pytest.mark.slow
def test_ui_takes_its_server_along(runs_folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "PIPELINE_MLRUNS": str(runs_folder)}
    command = [sys.executable, "-m", "pipeline.ui", f"port={port}"]
    shown = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert shown.stdout.readline().startswith(f"http://127.0.0.1:{port}/#/experiments/")
    wait_for_health(f"http://127.0.0.1:{port}")
    shown.terminate()
    assert shown.wait(timeout=30) == 0
    shown.stdout.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)


def wait_for_health(uri: str) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server did not start")


def test_two_processes_make_the_database_at_once(tmp_path):
    code = (
        "from pipeline.tracking.run import tracked_run\n"
        "with tracked_run('e', 'n', {}, {}, None) as run: run.log_metrics({'x': 1}, 0)"
    )
    env = {**os.environ, "PIPELINE_MLRUNS": str(tmp_path), "MLFLOW_TRACKING_URI": ""}
    both = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    assert len(list((tmp_path / "artifacts").iterdir())) == 2


@pytest.mark.slow
def test_a_real_server_dies_and_comes_back(tmp_path, monkeypatch, capsys):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"

    def serve() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
        command += ["--artifacts-destination", str(tmp_path / "artifacts")]
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
        server = subprocess.Popen(command, env=env, cwd=tmp_path, start_new_session=True)
        wait_for_health(uri)
        return server

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(store, "MLRUNS", tmp_path / "mlruns")
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 1)
    server = serve()
    try:
        with tracked() as run:
            run.log_metrics({"x": 0}, 0)
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            start = time.monotonic()
            run.log_metrics({"x": 1}, 1)
            assert time.monotonic() - start < 30
            said = capsys.readouterr()
            assert said.err.count("training goes on") == 1
            server = serve()
            time.sleep(1)
        assert said.out + capsys.readouterr().out == ""  # MLflow would advertise its links here
        client = store.connect()
        assert [m.value for m in client.get_metric_history(run.run_id, "x")] == [0, 1]
        assert client.get_run(run.run_id).info.status == "FINISHED"
        config = client.download_artifacts(run.run_id, "config.yaml")
        assert "inner_lr: 0.4" in Path(config).read_text()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
