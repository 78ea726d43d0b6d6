"""Runs in MLflow: where they are kept, how one is opened, written and closed. Floor 4.

With `outbox` the only module that imports mlflow. Without MLFLOW_TRACKING_URI the store is
`mlruns/mlflow.db` of the project, whatever the working directory.
"""

import json
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.pool import PROJECT
from pipeline.errors import UserError
from pipeline.outbox import Outbox, deliver_orphans

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

MLRUNS = Path(os.environ.get("PIPELINE_MLRUNS") or PROJECT / "mlruns").absolute()
_PARAM_LIMIT = 6000  # characters of a value; config.yaml has all of it
_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "mlflow", "meta-learning-pipeline")


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the project's own SQLite file by absolute path."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    return given or f"sqlite:///{MLRUNS / 'mlflow.db'}"


def connect() -> "MlflowClient":
    """A client of the store, which is made if it is the local one and does not exist.

    Raises:
        UserError: if the server does not answer or the folder cannot be written.
    """
    uri = tracking_uri()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # 7 hang for four minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if uri.startswith(("http://", "https://")):
        _ask_health(uri)
    _probe_write(MLRUNS)  # a server too leaves checkpoints, and what it misses, there
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with _opening(uri):
        if not uri.startswith("sqlite:///"):
            return MlflowClient(uri)
        from filelock import FileLock

        with FileLock(MLRUNS / ".lock"):  # two processes cannot make the same database
            client = MlflowClient(uri)
            _write_ahead(uri)
            return client


@contextmanager
def _opening(uri: str) -> Iterator[None]:
    """Whatever a store cannot do at the start is bad input, told in one line."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"MLFLOW_TRACKING_URI: {uri} cannot be opened ({reason})") from error


def _ask_health(uri: str) -> None:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=3):
            pass
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(
            f"MLFLOW_TRACKING_URI: no MLflow server answers at {uri} ({error}); start it, or unset "
            "the variable to track in mlruns/"
        ) from error


def _probe_write(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error


def _write_ahead(uri: str) -> None:
    """WAL lets several runs write at once without waiting for each other."""
    import sqlite3

    with suppress(sqlite3.Error):  # a network disk cannot; slower, not wrong
        connection = sqlite3.connect(uri.removeprefix("sqlite:///"), timeout=20)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.close()


def _experiment(client: "MlflowClient", name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        local = tracking_uri().startswith("sqlite:///")
        try:
            return client.create_experiment(name, str(MLRUNS / "artifacts") if local else None)
        except MlflowException:  # another process was first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"experiment_name: {name!r} was deleted in MLflow; restore it or take another"
        )
    return found.experiment_id


class Run:
    """An MLflow run that is being written to. Nothing it does can stop training."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self.run_id = run_id
        self.checkpoint_dir = MLRUNS / "checkpoints" / run_id
        self.experiment_id = client.get_run(run_id).info.experiment_id
        self._client = client
        self._outbox = Outbox(client, run_id, tracking_uri(), MLRUNS / "unsent")
        self._one_at_a_time = threading.RLock()  # the monitor of system metrics is a thread
        self._lost = False

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at a step."""
        plain = {k: float(v) for k, v in values.items()}
        self._send("metrics", values=plain, step=step, time=int(time.time() * 1000))

    def log_params(self, config: Mapping[str, Any]) -> None:
        """The flattened configuration, and all of it as the artifact config.yaml."""
        from omegaconf import OmegaConf

        values = {k: str(v)[:_PARAM_LIMIT] for k, v in flatten(config).items()}
        self._send("params", values=values)
        self._log_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))), "config.yaml")

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Tags, as text."""
        self._send("tags", values={k: str(v) for k, v in tags.items()})

    def log_table(self, frame: "pd.DataFrame", name: str) -> None:
        """NAME.csv for people and NAME.json for the MLflow UI, to which rows are added."""
        self._log_text(frame.to_csv(index=False), f"{name}.csv")
        clean = json.loads(frame.to_json(orient="columns"))
        columns = {key: list(column.values()) for key, column in clean.items()}
        self._send("table", columns=columns, to=f"{name}.json")

    def log_figure(self, figure: "Figure", path: str) -> None:
        """A PNG at the artifact path."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(path).name
            figure.savefig(file, dpi=150)
            self.log_file(file, str(Path(path).parent))

    def log_file(self, path: Path, to: str = "") -> None:
        """A file into the artifact folder `to`."""
        self._send("file", path=str(path), to="" if to == "." else to)

    def _log_text(self, text: str, name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / name
            file.write_text(text)
            self.log_file(file)

    def log_dataset(
        self, name: str, fingerprint: str, source: str, context: str, profile: Mapping[str, Any]
    ) -> None:
        """A data set that the run uses; MLflow's digest holds 36 characters of the fingerprint."""
        dataset = {
            "name": name,
            "digest": fingerprint[:36],
            "source_type": "code",
            "source": json.dumps({"class": source}),
            "profile": json.dumps(profile),
        }
        self._send("dataset", dataset=dataset, context=context)

    def close(self, status: str) -> None:
        """Upload the checkpoints, end the run; local copies stay unless all is well and sent."""
        for file in sorted(self.checkpoint_dir.glob("*.ckpt")):
            self.log_file(file, "checkpoints")
        self._send("status", now=True, status=status, time=int(time.time() * 1000))
        if status == "FINISHED" and not (self._lost or self._outbox.journal.exists()):
            for file in self.checkpoint_dir.glob("*.ckpt"):
                file.unlink()
            with suppress(OSError):
                self.checkpoint_dir.rmdir()

    def where(self) -> str:
        """One line: the run's id, and how to look at it."""
        uri = tracking_uri()
        if uri.startswith("http"):
            return f"run {self.run_id}: {uri}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"run {self.run_id}; make ui (or python -m pipeline.ui) opens it in MLflow"

    def _send(self, kind: str, now: bool = False, **fields: Any) -> None:
        try:
            with self._one_at_a_time:
                self._outbox.send({"kind": kind, **fields}, now=now)
        except OSError as error:  # the store is away and the disk does not take it either
            if not self._lost:
                print(f"tracking: {kind} lost, cannot be kept ({error})", file=sys.stderr)
            self._lost = True


class NoRun(Run):
    """Takes everything and keeps nothing: scoring a bare checkpoint is not tracked."""

    def __init__(self) -> None:
        self.run_id = ""

    def where(self) -> str:
        """That there is no run."""
        return "not tracked: a checkpoint file belongs to no run; run=RUN_ID does"

    def _send(self, kind: str, now: bool = False, **fields: Any) -> None:
        pass


@contextmanager
def tracked_run(
    experiment: str,
    name: str,
    config: Mapping[str, Any],
    tags: Mapping[str, Any],
    resume: str | None,
) -> Iterator[Run]:
    """Open a run and close it by how the block ends: FINISHED, FAILED or KILLED.

    Args:
        resume: id of a stopped run to go on with; None makes a new one.

    Raises:
        UserError: if the store cannot be used or the run to resume does not exist.
    """
    run = _open(experiment, name, resume)
    monitor = None
    status = "FAILED"
    try:
        with sigterm_interrupts():
            if not resume:
                run.log_params(config)
            run.set_tags({**_environment(), **tags})
            monitor = _monitor(run, resumed=bool(resume))
            yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        print(f"stopped; python -m pipeline.train resume={run.run_id} goes on", file=sys.stderr)
        raise
    finally:
        if monitor:
            monitor.finish()
        run.close(status)


def _open(experiment: str, name: str, resume: str | None) -> Run:
    """A new run, or the stopped one running again; first sends what others had to keep."""
    client, uri = connect(), tracking_uri()
    with _opening(uri):
        deliver_orphans(client, uri, MLRUNS / "unsent")
        if resume:
            client.update_run(existing(client, resume), status="RUNNING")
            return Run(client, resume)
        created = client.create_run(_experiment(client, experiment), run_name=name)
        return Run(client, created.info.run_id)


@contextmanager
def existing_run(run_id: str) -> Iterator[Run]:
    """Write to a run without changing its status.

    Raises:
        UserError: if there is no such run.
    """
    client = connect()
    yield Run(client, existing(client, run_id))


def existing(client: "MlflowClient", run_id: str) -> str:
    """The id, if the store has such a run.

    Raises:
        UserError: naming the newest runs, if not.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.run_id
    except MlflowException as error:
        experiments = [e.experiment_id for e in client.search_experiments()]
        newest = client.search_runs(experiments, max_results=3)
        known = ", ".join(f"{r.info.run_id} ({r.info.run_name})" for r in newest) or "none"
        raise UserError(
            f"run: no run {run_id!r} in {tracking_uri()}; the newest are {known}"
        ) from error


def find_checkpoint(run_id: str, which: str) -> Path:
    """The "best" or "last" checkpoint of a run: the local file, or its artifact.

    Raises:
        UserError: if there is no such run or it has no checkpoint yet.
    """
    local = MLRUNS / "checkpoints" / run_id / f"{which}.ckpt"
    if local.exists():
        return local
    client = connect()
    existing(client, run_id)
    if not any(
        a.path == f"checkpoints/{which}.ckpt" for a in client.list_artifacts(run_id, "checkpoints")
    ):
        raise UserError(f"run: {run_id} has no {which} checkpoint (stopped before the first one?)")
    return Path(client.download_artifacts(run_id, f"checkpoints/{which}.ckpt"))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are kept whole."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _environment() -> dict[str, str]:
    tags = {"host": socket.gethostname(), "version.python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            tags[f"version.{package}"] = metadata.version(package)
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        tags["git.commit"] = _git("rev-parse", "HEAD")
        tags["git.dirty"] = str(bool(_git("status", "--porcelain"))).lower()
    return tags


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PROJECT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _monitor(run: Run, resumed: bool) -> Any:
    """A started monitor of system metrics, or None where psutil is missing."""
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    except ImportError:
        return None

    class Monitor(SystemMetricsMonitor):
        def monitor(self) -> None:
            """Until the run ends: MLflow's own loop gives up when its server goes away."""
            while True:
                for _ in range(self.samples_before_logging):
                    self.collect_metrics()
                    if self._shutdown_event.wait(self.sampling_interval):
                        return
                self.publish_metrics(self.aggregate_metrics())

        def publish_metrics(self, metrics: dict[str, float]) -> None:
            """Through the run, so that a lost server loses none."""
            run.log_metrics({f"system/{k}": v for k, v in metrics.items()}, self._logging_step)
            self._logging_step += 1
            for monitor in self.monitors:
                monitor.clear_metrics()

    monitor = Monitor(run.run_id, resume_logging=resumed, tracking_uri=tracking_uri())
    monitor.start()
    return monitor


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, as a batch system sends it, ends a run as Ctrl-C does."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
