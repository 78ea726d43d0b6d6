"""Outbox: sends records to MLflow, keeps on disk what a lost server cannot take. Floor 4."""

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

Record = dict[str, Any]
RETRY_SECONDS = 60
_OUR_MISTAKE = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class Outbox:
    """In-order delivery for one run: what cannot be sent now is sent later, nothing is lost.

    Kept records lie in `FOLDER/RUN_ID.jsonl`, kept files in `FOLDER/RUN_ID/`. The first line of a
    journal says whose it is.
    """

    def __init__(self, client: "MlflowClient", run_id: str, uri: str, folder: Path) -> None:
        self.client, self.run_id, self.uri = client, run_id, uri
        self.journal = folder / f"{run_id}.jsonl"
        self.files = folder / run_id
        self.refused = set[str]()  # kinds of records that the store did not want
        self._next_try = 0.0
        self._head = {"uri": uri, "pid": os.getpid(), "host": socket.gethostname()}
        self._away = self.journal.exists()
        if self._away:  # of the run that this process resumes: now it is ours
            _write(self.journal, [self._head, *_read(self.journal)[1]])

    def send(self, record: Record, now: bool = False) -> Any:
        """Deliver a record after all that were kept, or keep it.

        While the server is away it is tried once a minute, or at once with `now`.

        Returns:
            What `perform` returns; None if it was not delivered.
        """
        if self._away and not now and time.monotonic() < self._next_try:
            self._keep(record)
            return None
        try:
            self._deliver_kept()
            return perform(self.client, self.run_id, record)
        except Exception as error:  # tracking must not stop training, whatever the store raises
            if _refused(error):
                if record["kind"] not in self.refused:
                    print(_refusal(record, error), file=sys.stderr)
                    self.refused.add(record["kind"])
                return None
            if not self._away:
                print(
                    f"tracking: {self.uri} does not answer ({_reason(error)}); training goes on, "
                    f"what is not sent is kept in {self.journal.parent}",
                    file=sys.stderr,
                )
            self._away, self._next_try = True, time.monotonic() + RETRY_SECONDS
            self._keep(record)
            return None

    def _deliver_kept(self) -> None:
        if not self._away:
            return
        for line in deliver(self.client, self.journal, self.refused):
            print(line, file=sys.stderr)
        self._away = False

    def _keep(self, record: Record) -> None:
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        if record["kind"] in ("file", "model"):
            kept = self.files / f"{time.monotonic_ns()}" / Path(record["path"]).name
            kept.parent.mkdir(parents=True)
            copy = shutil.copy2 if record["kind"] == "file" else shutil.copytree
            copy(record["path"], kept)
            record = record | {"path": str(kept)}
        with self.journal.open("a") as file:
            lines = [record] if file.tell() else [self._head, record]
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def deliver(client: "MlflowClient", journal: Path, refused: set[str]) -> Iterator[str]:
    """Send what a journal holds, in order, and remove it; says so in a line if it held any.

    Adds to `refused` the kinds of records that the store did not want.
    """
    run_id = journal.stem
    head, records = _read(journal)
    sent = len(records)
    for i, record in enumerate(records):
        try:
            perform(client, run_id, record)
        except BaseException as error:  # Ctrl-C too
            if _refused(error):  # and would be the next time: the rest must not wait for it
                refused.add(record["kind"])
                sent -= 1
                yield _refusal(record, error)
                continue
            _write(journal, [head, *records[i:]])  # what was sent must not be sent twice
            raise
    journal.unlink()
    shutil.rmtree(journal.with_suffix(""), ignore_errors=True)
    if records:
        yield f"tracking: sent {sent} kept records of run {run_id}"


def deliver_orphans(client: "MlflowClient", uri: str, folder: Path) -> None:
    """Send what earlier runs on the same store had to keep; leaves those of living processes."""
    for journal in sorted(folder.glob("*.jsonl")):
        head, _ = _read(journal)
        if head.get("uri", uri) != uri:
            continue
        if head and _in_use(journal, head):
            continue
        try:
            for line in deliver(client, journal, set()):
                print(line, file=sys.stderr)
        except Exception as error:  # still away, or the run is gone: keep it for the next time
            print(f"tracking: {journal} could not be sent ({_reason(error)})", file=sys.stderr)


def _read(journal: Path) -> tuple[Record, list[Record]]:
    """The head and the records; without what a kill cut off in the middle of a line."""
    lines = []
    for text in journal.read_text(errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    head = lines[0] if lines and "kind" not in lines[0] else {}
    return head, [line for line in lines if "kind" in line]


def _write(journal: Path, lines: list[Record]) -> None:
    whole = journal.with_suffix(".tmp")
    whole.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole.replace(journal)


def _refused(error: BaseException) -> bool:
    """Whether the store answers and does not want this record."""
    return getattr(error, "error_code", None) in _OUR_MISTAKE


def _refusal(record: Record, error: BaseException) -> str:
    return f"tracking: MLflow refused {record['kind']} ({_reason(error)})"


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _in_use(journal: Path, head: Record) -> bool:
    """By a living process here, or by one elsewhere: it writes system metrics every ten seconds."""
    if head["host"] == socket.gethostname():
        return _alive(head["pid"])
    return time.time() - journal.stat().st_mtime < 10 * RETRY_SECONDS


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def perform(client: "MlflowClient", run_id: str, record: Record) -> str | None:
    """Make the MLflow call that a record stands for; returns the URI of a model."""
    from mlflow import entities

    match record["kind"]:
        case "metrics":
            metrics = [
                entities.Metric(key, value, record["time"], record["step"])
                for key, value in record["values"].items()
            ]
            client.log_batch(run_id, metrics=metrics)
        case "params":
            params = [entities.Param(k, v) for k, v in record["values"].items()]
            for start in range(0, len(params), 100):  # MLflow's limit for one call
                client.log_batch(run_id, params=params[start : start + 100])
        case "tags":
            tags = [entities.RunTag(k, v) for k, v in record["values"].items()]
            client.log_batch(run_id, tags=tags)
        case "file":
            client.log_artifact(run_id, record["path"], record["to"] or None)
        case "model":
            from pipeline.tracking.models import upload

            return upload(client, run_id, record)
        case "table":
            client.log_table(run_id, record["columns"], record["to"])
        case "dataset":
            dataset = entities.Dataset(**record["dataset"])
            context = entities.InputTag("mlflow.data.context", record["context"])
            client.log_inputs(run_id, datasets=[entities.DatasetInput(dataset, [context])])
        case "status":
            client.set_terminated(run_id, record["status"], record["time"])
        case kind:
            raise ValueError(f"unknown record {kind!r}")
    return None
