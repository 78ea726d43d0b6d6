"""Where trials are kept, and how one whose worker died is taken up again. Floor 5."""

import logging
import os
import socket
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipeline.errors import UserError

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
SILENT_BEATS = 4  # missed ones after which a trial is lost
ASKING_SECONDS = 600  # a driver takes at most to say that a trial is its own
_BROKEN = (ImportError, OSError, ValueError)


def quieten() -> None:
    """Optuna's log lines and its notices about what is experimental stay out of a terminal."""
    logging.getLogger("optuna").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")
    warnings.filterwarnings("ignore", message="Target and region quantiles")  # few trials


def local_url(mlruns: Path) -> str:
    """A file of its own: MLflow's and Optuna's tables do not fit into one."""
    return f"sqlite:///{mlruns / 'optuna.db'}"


def shown_url(url: str) -> str:
    """The URL as people may see it: without its password."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def prepare(url: str, mlruns: Path) -> None:
    """Make the database before workers meet at it.

    Raises:
        UserError: if it cannot be opened.
    """
    from filelock import FileLock

    with FileLock(mlruns / ".optuna.lock"):
        with closing(open_storage(url, 60, 1)):
            pass
        if url.startswith("sqlite:///"):
            _write_ahead(url)


def _write_ahead(url: str) -> None:
    import sqlite3

    with suppress(sqlite3.Error):  # a network disk cannot; slower, not wrong
        connection = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=20)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.close()


@contextmanager
def only_driver(url: str, study: str, folder: Path) -> Iterator[None]:
    """Keeps other drivers off a study in SQLite, where two may take up the same waiting trial.

    Raises:
        UserError: if there is one.
    """
    from filelock import FileLock, Timeout

    if not url.startswith("sqlite"):  # servers lock the row that they read
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".driver.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"study: another sweep is at work on {study!r}; study=OTHER_NAME begins another, "
            "storage=postgresql+psycopg://... lets several share one"
        ) from error
    try:
        yield
    finally:
        lock.release()


def open_storage(url: str, heartbeat: int, attempts: int) -> RDBStorage:
    """The database at a URL of SQLAlchemy.

    Args:
        heartbeat: seconds between two signs of life of a trial.
        attempts: of a trial whose worker dies.

    Raises:
        UserError: if it cannot be opened.
    """
    from sqlalchemy.exc import SQLAlchemyError

    quieten()

    def stale(study: Study, trial: FrozenTrial) -> None:
        _again(study, trial, attempts)

    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        options = {"connect_args": {"timeout": 60}}
    try:
        return RDBStorage(
            url,
            engine_kwargs=options,
            heartbeat_interval=heartbeat,
            grace_period=SILENT_BEATS * heartbeat,
            heartbeat_stale_trial_callback=stale,
        )
    except (SQLAlchemyError, *_BROKEN) as error:
        reason = " ".join(str(error).split())[:200].replace(url, shown_url(url))
        raise UserError(f"storage: {shown_url(url)} cannot be opened ({reason})") from error


@contextmanager
def closing(storage: RDBStorage) -> Iterator[RDBStorage]:
    """Gives back its connections at the end of the block."""
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def trial_id(storage: RDBStorage, study: str, number: int) -> int:
    """The storage's id of a trial."""
    return storage.get_trial_id_from_study_id_trial_number(
        storage.get_study_id_from_name(study), number
    )


def requeue(storage: RDBStorage, study: Study, number: int, attempts: int | None = None) -> bool:
    """End a trial that stopped in the middle and have its values run again, from where it was.

    Args:
        attempts: how often a trial may be begun that takes its worker down; None for one that
            was stopped from outside.

    Returns:
        Whether they run again.
    """
    with suppress(optuna.exceptions.UpdateFinishedTrialError):  # somebody else was first
        storage.set_trial_state_values(trial_id(storage, study.study_name, number), TrialState.FAIL)
        return _again(study, study.get_trials(deepcopy=False)[number], attempts)
    return True


def _again(study: Study, trial: FrozenTrial, attempts: int | None) -> bool:
    deaths = trial.user_attrs.get("deaths", 0) + (attempts is not None)
    if attempts is not None and deaths >= attempts:
        return False
    kept = {k: v for k, v in trial.user_attrs.items() if k not in ("process", "error")}
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={**kept, "deaths": deaths, "continues": trial.number},
            system_attrs=trial.system_attrs,
            intermediate_values=trial.intermediate_values,
        )
    )
    return True


def this_process() -> list[Any]:
    """Host, process id and start: what tells whether it still lives."""
    return [socket.gethostname(), os.getpid(), psutil.Process().create_time()]


def lost_here(trials: Sequence[FrozenTrial], sole: bool) -> list[int]:
    """Numbers of running trials whose process was on this machine and is gone.

    And of those that have none, as a driver died that was asking for them.

    Args:
        sole: no other driver can be asking now.
    """
    lost = []
    for trial in (t for t in trials if t.state == TrialState.RUNNING):
        host, pid, start = trial.user_attrs.get("process", ["", 0, 0.0])
        if not host:
            begun = trial.datetime_start or datetime.now()
            if sole or (datetime.now() - begun).total_seconds() > ASKING_SECONDS:
                lost.append(trial.number)
            continue
        if host != socket.gethostname():
            continue
        try:
            process = psutil.Process(pid)
            alive = (
                abs(process.create_time() - start) < 1 and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            alive = False
        if not alive:
            lost.append(trial.number)
    return lost


@contextmanager
def heartbeats(storage: RDBStorage, trial: int) -> Iterator[None]:
    """Sign that a trial (its id) lives, until the block ends; a lost database is tried again."""
    from sqlalchemy.exc import SQLAlchemyError

    over = threading.Event()

    def beat() -> None:
        while True:
            with suppress(SQLAlchemyError, optuna.exceptions.StorageInternalError):
                storage.record_heartbeat(trial)
            if over.wait(storage.get_heartbeat_interval()):
                break
        storage.remove_session()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
