"""One run: what is written to it, and how it is opened and closed."""

import json
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.processes import handling
from pipeline.tracking import store
from pipeline.tracking.outbox import Outbox, deliver_orphans
from pipeline.tracking.surroundings import environment, start_monitor

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

_PARAM_LIMIT = 6000  # characters of a value; config.yaml has all of it


class Run:
    """An MLflow run that is being written to. Nothing it does can stop training."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self.run_id = run_id
        self.checkpoint_dir = store.MLRUNS / "checkpoints" / run_id
        self.experiment_id = client.get_run(run_id).info.experiment_id
        self._client = client
        self._outbox = Outbox(client, run_id, store.tracking_uri(), store.MLRUNS / "unsent")
        self._one_at_a_time = threading.RLock()  # the monitor of system metrics is a thread
        self._lost = False

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at a step."""
        plain = {k: float(v) for k, v in values.items()}
        self._send("metrics", values=plain, step=step, time=int(time.time() * 1000))

    def log_params(self, config: Mapping[str, Any], changed: bool = False) -> None:
        """The flattened configuration, and all of it as the artifact config.yaml.

        Args:
            changed: of a run that has parameters, which stay as they are: config.yaml alone.
        """
        from omegaconf import OmegaConf

        if not changed:
            self.log_values(flatten(config))
        self.log_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))), "config.yaml")

    def log_values(self, values: Mapping[str, Any]) -> None:
        """Parameters, as text; MLflow takes each once."""
        self._send("params", values={k: str(v)[:_PARAM_LIMIT] for k, v in values.items()})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Tags, as text."""
        self._send("tags", values={k: str(v) for k, v in tags.items()})

    def log_table(self, frame: "pd.DataFrame", csv: str, table: str) -> None:
        """A CSV file for people, and rows added to a table that the MLflow UI shows."""
        self.log_csv(frame, csv)
        clean = json.loads(frame.to_json(orient="columns"))
        columns = {key: list(column.values()) for key, column in clean.items()}
        self._send("table", columns=columns, to=table)

    def put_table(self, frame: "pd.DataFrame", path: str) -> None:
        """A table that the MLflow UI shows, in place of the one that was at this path."""
        self.log_text(frame.to_json(orient="split", index=False), path)
        shown = [{"path": path, "type": "table"}]
        self.set_tags({"mlflow.loggedArtifacts": json.dumps(shown)})

    def log_csv(self, frame: "pd.DataFrame", path: str) -> None:
        """A CSV file at the artifact path."""
        self.log_text(frame.to_csv(index=False), path)

    def log_figure(self, figure: "Figure", path: str) -> None:
        """A PNG at the artifact path."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(path).name
            figure.savefig(file, dpi=150, bbox_inches="tight")  # names may be long
            self.log_file(file, str(Path(path).parent))

    def log_file(self, path: Path, to: str = "") -> None:
        """A file into the artifact folder `to`."""
        self._send("file", path=str(path), to="" if to == "." else to)

    def log_text(self, text: str, path: str) -> None:
        """A text file at the artifact path."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(path).name
            file.write_text(text)
            self.log_file(file, str(Path(path).parent))

    def log_model(
        self,
        folder: Path,
        tags: Mapping[str, str],
        description: str,
        name: str | None,
        alias: str | None,
    ) -> str | None:
        """A folder as MLflow writes models, named as the folder, registered if `name` is given.

        Returns:
            Its URI; None if it could not be sent now.
        """
        registered = {"description": description, "name": name, "alias": alias}
        return self._send("model", path=str(folder), tags=dict(tags), now=True, **registered)

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
        unsent = self._lost or self._outbox.journal.exists() or "file" in self._outbox.refused
        if status == "FINISHED" and not unsent:
            for file in self.checkpoint_dir.glob("*.ckpt"):
                file.unlink()
            with suppress(OSError):
                self.checkpoint_dir.rmdir()

    def where(self) -> str:
        """One line: the run's id, and how to look at it."""
        uri = store.tracking_uri()
        if uri.startswith("http"):
            return f"run {self.run_id}: {uri}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"run {self.run_id}; make ui (or python -m pipeline.ui) opens it in MLflow"

    def _send(self, kind: str, now: bool = False, **fields: Any) -> Any:
        try:
            with self._one_at_a_time:
                return self._outbox.send({"kind": kind, **fields}, now=now)
        except OSError as error:  # the store is away and the disk does not take it either
            if not self._lost:
                print(f"tracking: {kind} lost, cannot be kept ({error})", file=sys.stderr)
            self._lost = True


class NoRun(Run):
    """Takes everything and keeps nothing: for a bare checkpoint, and all processes but one."""

    def __init__(self) -> None:
        self.run_id, self.checkpoint_dir = "", Path()

    def where(self) -> str:
        """That there is no run."""
        return "not tracked: a checkpoint file belongs to no run; run=RUN_ID does"

    def _send(self, kind: str, now: bool = False, **fields: Any) -> Any:
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
    first = {k: str(v) for k, v in tags.items()}  # a kill finds them, however early it comes
    run = _open(experiment, name, resume, first)
    monitor = None
    status = "FAILED"
    try:
        with sigterm_interrupts():
            run.log_params(config, changed=bool(resume))
            run.set_tags({**environment(), **tags})
            monitor = start_monitor(run, resumed=bool(resume))
            yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        if (run.checkpoint_dir / "last.ckpt").exists():
            print(f"stopped; python -m pipeline.train resume={run.run_id} goes on", file=sys.stderr)
        raise
    finally:
        if monitor:
            monitor.finish()
        run.close(status)


def _open(experiment: str, name: str, resume: str | None, tags: dict[str, str]) -> Run:
    """A new run, or the stopped one running again; first sends what others had to keep."""
    client, uri = store.connect(), store.tracking_uri()
    with store.opening(uri):
        deliver_orphans(client, uri, store.MLRUNS / "unsent")
        if resume:
            client.update_run(store.existing(client, resume), status="RUNNING")
            return Run(client, resume)
        where = store.experiment_id(client, experiment)
        created = client.create_run(where, run_name=name, tags=tags)
        return Run(client, created.info.run_id)


@contextmanager
def existing_run(run_id: str) -> Iterator[Run]:
    """Write to a run without changing its status.

    Raises:
        UserError: if there is no such run.
    """
    client = store.connect()
    yield Run(client, store.existing(client, run_id))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are kept whole."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, as a batch system sends it, ends a run as Ctrl-C does."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    with handling(interrupt, signal.SIGTERM):
        yield
