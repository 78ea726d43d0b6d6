"""Where runs are kept: the MLflow store, made on first use and opened with care."""

import json
import logging
import os
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.pool import PROJECT
from pipeline.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_VIEW = "comparison"
MLRUNS = Path(os.environ.get("PIPELINE_MLRUNS") or PROJECT / "mlruns").absolute()


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
    with opening(uri):
        if not uri.startswith("sqlite:///"):
            return MlflowClient(uri)
        from filelock import FileLock

        with FileLock(MLRUNS / ".lock"):  # two processes cannot make the same database
            client = MlflowClient(uri)
            _write_ahead(uri)
            return client


@contextmanager
def opening(uri: str) -> Iterator[None]:
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


def experiment_id(client: "MlflowClient", name: str) -> str:
    """The id of an experiment, which is made if there is none of that name.

    Raises:
        UserError: if it was deleted.
    """
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


COLUMNS = ("metrics.`test/acc`", "metrics.`test/acc_ci95`", "metrics.`test/floor_acc`",
           "metrics.`val/acc`", "tags.`protocol`", "tags.`data`",
           "attributes.`Duration`")  # fmt: skip
CHARTS = "&compareRunsMode=CHART"
"""Added to the path of a view: its runs as charts."""


def share_view(
    client: "MlflowClient",
    experiment: str,
    key: str = _VIEW,
    columns: Sequence[str] = COLUMNS,
    condition: str = "",
    best: str = "attributes.start_time",
    ascending: bool = False,
) -> str:
    """Save columns that compare runs as a view of the runs table, which hides metrics.

    Args:
        key: of the view in the experiment.
        condition: of the runs that are shown.
        best: what they are ordered by, the highest first unless `ascending`. Ordered by time, runs
            below a parent are folded away, and charts leave out what is.

    Returns:
        The path of the view in MLflow's UI.
    """
    view = {
        "searchFilter": condition,
        "orderByKey": best,
        "orderByAsc": ascending,
        "selectedColumns": list(columns),
    }
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{key}", json.dumps(view))
    return f"#/experiments/{experiment}/runs?viewStateShareKey={key}"


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
