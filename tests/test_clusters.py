"""Sweeps beyond one SQLite file: PostgreSQL with an MLflow server, Ray, SLURM's submitit."""

import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from pipeline import sweep
from pipeline.compose import compose_config
from pipeline.errors import UserError
from pipeline.study import settings, storage
from pipeline.study.slurm import SlurmExecutor
from pipeline.tracking import store
from tests.test_sweep import TINY, a_driver, children, composed
from tests.test_train import REPO

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("runs_folder")]
BINARIES = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
OPEN = (TrialState.RUNNING, TrialState.WAITING)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of the test's own: everything of its URL but the database."""
    pytest.importorskip("psycopg", reason="psycopg is not installed; pip install '.[postgresql]'")
    if not BINARIES:
        pytest.skip("no PostgreSQL here; apt-get install postgresql")
    programs, port = Path(BINARIES[-1]).parent, free_port()
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    if as_user:
        shutil.chown(folder, "postgres", "postgres")

    def call(program: str, *arguments: str) -> None:
        command = [*as_user, str(programs / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd="/")

    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    call("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "postgres")
    call("pg_ctl", "-D", f"{folder}/data", "-w", "-o", options, "-l", f"{folder}/log", "start")
    try:
        for name in ("optuna", "mlflow", "shared"):
            call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", name)
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}"
    finally:
        call("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture
def mlflow_server(postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", f"{postgres}/mlflow"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    lean = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **lean, "PATH": path}, stdout=log, stderr=log
        )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    deadline = time.monotonic() + 120
    while True:
        try:
            store._ask_health(f"http://127.0.0.1:{port}")
            break
        except UserError:
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


def test_postgresql_and_a_server_of_mlflow_with_three_workers(postgres, mlflow_server, capfd):
    overrides = [*TINY, "workers=3", "n_trials=6", f"storage={postgres}/optuna"]
    result = sweep.run(compose_config("sweep", overrides), overrides)
    with storage.closing(storage.open_storage(f"{postgres}/optuna", 15, 3)) as database:
        trials = optuna.load_study(study_name=result["study"], storage=database).get_trials()
    assert len(trials) == 6
    assert {t.state for t in trials} <= set(storage.FINISHED)
    runs = children(result["run_id"])
    assert len(runs) == 6
    assert {r.info.status for r in runs} == {"FINISHED"}
    client = store.connect()
    assert client.get_run(result["run_id"]).info.status == "FINISHED"
    assert client.list_artifacts(result["run_id"], "study")
    for run in runs:
        assert {f.path for f in client.list_artifacts(run.info.run_id, "checkpoints")} == {
            "checkpoints/best.ckpt", "checkpoints/last.ckpt"}  # fmt: skip
    out = capfd.readouterr()
    assert "error" not in out.err
    assert "failed" not in out.out


def test_two_drivers_share_a_study(postgres, monkeypatch, tmp_path):
    """Each with workers that die, stop and fail: exactly n_trials end, none is begun twice."""
    from pipeline.study import driver

    monkeypatch.setattr(driver, "close_dead", lambda *a: None)
    monkeypatch.setattr(driver, "MOST_FAILURES", 1000)
    made = composed("learner=maml", "n_trials=30", "sampler=random", "attempts=99")
    url = f"{postgres}/shared"
    storage.prepare(url, tmp_path)
    drivers = [a_driver(url, made, seed=i) for i in range(3)]
    threads = [threading.Thread(target=d.run) for d in drivers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()
    trials = drivers[0].study.get_trials()
    assert sum(t.state in storage.FINISHED for t in trials) == 30
    assert not [t for t in trials if t.state in OPEN]
    for each in drivers:
        each.storage.engine.dispose()


def test_ray_with_two_nodes_and_a_worker_killed(monkeypatch, tmp_path):
    """In a process of its own: Ray leaves threads and settings behind."""
    pytest.importorskip("ray", reason="ray is not installed; pip install '.[ray]'")
    overrides = [*TINY, "executor=ray", "n_trials=5", "pruner=none", "trainer.max_steps=100"]
    code = (
        "import sys, ray; from ray.cluster_utils import Cluster;"
        "cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 1});"
        "cluster.add_node(num_cpus=1); print('cluster', cluster.address, flush=True);"
        "sys.argv.append('address=' + cluster.address);"
        "from pipeline.cli import main; from pipeline.sweep import run; main('sweep', run)"
    )
    env = {**os.environ, "PIPELINE_MLRUNS": str(store.MLRUNS), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", code, *[o for o in overrides if not o.startswith("workers")]]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=REPO, env=env, stdout=out, stderr=out)
    made = composed(*overrides)
    try:
        victim = _first_checkpoint(made, process, tmp_path / "out")
        os.kill(victim.user_attrs["process"][1], signal.SIGKILL)
        assert process.wait(400) == 0, (tmp_path / "out").read_text()
    finally:
        for child in (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        ):
            child.kill()
        process.kill()
    database = storage.open_storage(storage.local_url(store.MLRUNS), 2, 3)
    study = optuna.load_study(study_name=made.name, storage=database)
    trials = study.get_trials()
    assert sum(t.state == TrialState.COMPLETE for t in trials) == 5
    assert not [t for t in trials if t.state in OPEN]
    (again,) = [t for t in trials if t.user_attrs.get("continues") == victim.number]
    assert again.user_attrs["run_id"] == victim.user_attrs["run_id"]
    runs = children(study.user_attrs["run_id"])
    assert {r.info.status for r in runs} <= {"FINISHED", "KILLED"}
    assert len({t.user_attrs["process"][1] for t in trials}) >= 2  # both nodes worked


def _first_checkpoint(made: settings.Settings, process: subprocess.Popen, out: Path):
    """A running trial that has a checkpoint."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, out.read_text()
        time.sleep(0.2)
        if not list((store.MLRUNS / "sweeps").glob("*")):
            continue
        database = storage.open_storage(storage.local_url(store.MLRUNS), 2, 3)
        for trial in optuna.load_study(study_name=made.name, storage=database).get_trials():
            run_id = trial.user_attrs.get("run_id")
            last = store.MLRUNS / "checkpoints" / str(run_id) / "last.ckpt"
            if trial.state == TrialState.RUNNING and last.exists():
                return trial
    raise AssertionError(out.read_text())


def test_submitit_runs_trials_as_jobs(monkeypatch, tmp_path):
    """Its local cluster: the same jobs as under SLURM, in processes of their own."""
    pytest.importorskip("submitit", reason="submitit is not installed; pip install '.[slurm]'")
    overrides = [*TINY, "executor=slurm", "workers=2", "n_trials=3", "slurm.timeout_min=10"]
    monkeypatch.setenv("PIPELINE_MLRUNS", str(store.MLRUNS))
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setattr(
        sweep,
        "_make_executor",
        lambda cfg, logs, most: SlurmExecutor(logs, 2, {"timeout_min": 10}, "local"),
    )
    overrides = [o for o in overrides if "slurm.timeout" not in o]
    result = sweep.run(compose_config("sweep", overrides), overrides)
    assert 0 < result["best_value"] <= 1
    assert {r.info.status for r in children(result["run_id"])} == {"FINISHED"}
