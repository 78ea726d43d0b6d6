"""`python -m pipeline.survey`: every learner, one budget, the same tests, one table. Floor 5.

A row is runs of `train` and `evaluate`, each a process of its own: one that fails or is killed
costs its row alone.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from omegaconf import DictConfig

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.processes import uninterrupted
from pipeline.train import quieten

if TYPE_CHECKING:
    from pipeline.plan import Job, Shelf

PATIENCE = 60  # seconds in which an interrupted training stores its checkpoint


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Do what of the survey is not done yet, and write its table.

    Returns:
        `out`, the file, and `failed`, the names of the jobs that ended in an error.

    Raises:
        UserError: for bad input, before anything is trained.
    """
    quieten()
    from pipeline import config, overview
    from pipeline.data.pool import PROJECT
    from pipeline.plan import Shelf, plan
    from pipeline.study.local import environments
    from pipeline.tracking import store
    from pipeline.tracking.run import sigterm_interrupts

    config.check_root(cfg, "survey")
    jobs = plan(cfg)
    logs = store.MLRUNS / "survey"
    usual = logs if cfg.learners else PROJECT / "docs"
    out = PROJECT / Path(cfg.out).expanduser() if cfg.out else usual / "learners.md"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror})") from error
    shelf = Shelf(cfg.experiment_name)
    missing = [job for job in jobs if not shelf.is_done(job)]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} trainings are done and tested", flush=True)
    failed: list[str] = []
    logs.mkdir(parents=True, exist_ok=True)
    with sigterm_interrupts(), (logs / ".lock").open("w") as lock:
        _wait_for(lock)
        try:
            for wave in ([j for j in missing if not j.after], [j for j in missing if j.after]):
                if wave:
                    places = environments(cfg.workers, 1, use_gpus=True, most=len(wave))
                    failed += _Workers(shelf, logs, lock, places).run(wave)
        finally:  # what is there so far, however it ends
            overview.write(out, cfg, jobs, shelf)
            print(f"wrote {out}")
    if failed:
        raise UserError("\n".join(failed))
    return {"out": out}


def _wait_for(lock: IO[str]) -> None:
    """Trainings inherit the lock: those of a survey that was killed end before they are resumed."""
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("waiting for another survey, or for trainings that it started", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


class _Workers:
    """Runs jobs side by side, each step of them as a process.

    Args:
        logs: folder for what they print, a file a job.
        lock: handed to every process.
        places: the environment variables of each worker.
    """

    def __init__(
        self, shelf: "Shelf", logs: Path, lock: IO[str], places: Sequence[dict[str, str]]
    ) -> None:
        self.shelf, self.logs, self.lock = shelf, logs, lock
        self.places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for place in places:
            self.places.put(place)
        self.count, self.stopping = len(places), False
        self.processes: set[subprocess.Popen[bytes]] = set()
        self._starting = threading.Lock()  # none starts unseen by `_stop`

    def run(self, jobs: Sequence["Job"]) -> list[str]:
        """Do the jobs.

        Returns:
            A line for each one that failed.
        """
        failed = []
        with ThreadPoolExecutor(self.count) as pool:
            futures = {pool.submit(self._do, job): job for job in jobs}
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    problem, seconds = future.result()
                    name = futures[future].name
                    failed += [f"{name}: {problem}"] * bool(problem)
                    minutes = f"{int(seconds // 60)}:{int(seconds % 60):02d}"
                    word = f"failed: {problem}" if problem else "done"
                    print(f"{done}/{len(jobs)}  {name}  {word}  ({minutes})", flush=True)
            except BaseException:
                with uninterrupted():
                    self._stop()
                pool.shutdown(cancel_futures=True)
                raise
        return failed

    def _do(self, job: "Job") -> tuple[str, float]:
        """One job, step after step; what went wrong (or nothing), and how long it took."""
        place, start, before = self.places.get(), time.monotonic(), [""]
        try:
            while (step := self.shelf.next_command(job)) and not self.stopping:
                if step == before:
                    return f"{' '.join(step)} did not leave the test that it should", 0.0
                before = step
                log = self.logs / f"{job.name}.log"
                if code := self._execute(step, place, log):
                    lines = log.read_text(errors="replace").strip().splitlines() or [""]
                    return f"exit code {code} of {' '.join(step)}: {lines[-1]}", 0.0
            return "", time.monotonic() - start
        except UserError as error:
            return str(error), time.monotonic() - start
        finally:
            self.places.put(place)

    def _execute(self, step: Sequence[str], place: dict[str, str], log: Path) -> int:
        with self._starting, log.open("ab") as file:
            if self.stopping:
                return 130
            process = subprocess.Popen(
                [sys.executable, "-m", *step], stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                env={**os.environ, **place}, start_new_session=True, pass_fds=[self.lock.fileno()],
            )  # fmt: skip
            self.processes.add(process)
        try:
            return process.wait()
        finally:
            self.processes.discard(process)

    def _stop(self) -> None:
        """Have the trainings store their checkpoints and end."""
        with self._starting:
            self.stopping = True
            running = list(self.processes)
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    main("survey", run)
