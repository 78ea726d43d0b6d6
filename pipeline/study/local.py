"""Workers on this machine: one process a GPU, or a core. Floor 5."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from pipeline.data.pool import PROJECT
from pipeline.errors import UserError
from pipeline.study.worker import Job, Reply
from pipeline.tracking import store

MEMORY = 2 * 2**30  # bytes that a worker on a CPU may take
PATIENCE = 120  # seconds for interrupted trainings to upload their checkpoints
MOST_DEATHS = 3  # in a row, of workers that did not get as far as to be ready


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may hold for one process each; asks the driver, not torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [part.strip() for part in given.split(",") if part.strip() not in ("", "-1")]
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environments(
    workers: int | str, workers_per_gpu: int, use_gpus: bool, most: int
) -> list[dict[str, str]]:
    """What each worker sees: one device, and its share of the threads.

    Args:
        workers: how many, or "auto": `workers_per_gpu` on each GPU, else one a core as far as
            memory goes.
        most: jobs that there are.

    Raises:
        UserError: if there are more workers than GPUs take.
    """
    devices = gpus() if use_gpus else []
    if devices:
        places = [device for device in devices for _ in range(workers_per_gpu)]
        if isinstance(workers, int) and workers > len(places):
            raise UserError(
                f"workers: found {workers}; {len(devices)} GPUs with workers_per_gpu="
                f"{workers_per_gpu} take {len(places)}"
            )
        count = len(places) if workers == "auto" else int(workers)
    else:
        fit = max(1, int(psutil.virtual_memory().available // MEMORY))
        count = min(cores(), fit) if workers == "auto" else int(workers)
        places = [""] * count
    count = min(count, most)
    threads = str(max(1, cores() // count))
    return [{"CUDA_VISIBLE_DEVICES": p, "OMP_NUM_THREADS": threads} for p in places[:count]]


class Worker:
    """A process that answers jobs; its session is its own, so that Ctrl-C is the driver's.

    Args:
        told: gets (self, reply), and (self, None) when the process has ended.
    """

    def __init__(
        self, env: dict[str, str], log: Path, told: "queue.SimpleQueue[tuple[Worker, Reply | None]]"
    ) -> None:
        self.env, self.log = env, log
        self.job: Job | None = None
        self.is_ready = self.is_leaving = False
        here = {"PYTHONPATH": _path(), "PIPELINE_MLRUNS": str(store.MLRUNS)}
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.study.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, bufsize=1,
                cwd=os.getcwd(), start_new_session=True,
                env={**os.environ, **here, **env},
            )  # fmt: skip
        assert self._process.stdout
        out: IO[str] = self._process.stdout

        def listen() -> None:
            for line in out:
                told.put((self, json.loads(line)))
            self._process.wait()
            told.put((self, None))

        self._listener = threading.Thread(target=listen, daemon=True)
        self._listener.start()

    def send(self, job: Job) -> None:
        """Have it do a job."""
        self.job = job
        assert self._process.stdin
        with suppress(OSError):  # it is dead, and its end will be told
            self._process.stdin.write(json.dumps(job._asdict()) + "\n")

    @property
    def is_free(self) -> bool:
        """Whether it would start a job at once."""
        return self.job is None and not self.is_leaving

    def ask_to_end(self) -> None:
        """The end of its input interrupts what it does."""
        assert self._process.stdin
        with suppress(OSError):
            self._process.stdin.close()

    def end(self, seconds: float) -> None:
        """Wait for its end; kill it if that takes longer."""
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._listener.join()  # reads to the end
        assert self._process.stdout
        self._process.stdout.close()


class LocalExecutor:
    """Keeps its workers busy and replaces those that die.

    Args:
        logs: folder for what trainings print, a file a worker.
    """

    def __init__(self, environments: list[dict[str, str]], logs: Path) -> None:
        self._told: queue.SimpleQueue[tuple[Worker, Reply | None]] = queue.SimpleQueue()
        logs.mkdir(parents=True, exist_ok=True)
        self.workers = [
            Worker(env, logs / f"worker-{i}.log", self._told) for i, env in enumerate(environments)
        ]
        self._deaths = 0

    @property
    def slots(self) -> int:
        """Jobs that run at once."""
        return len(self.workers)

    def free(self) -> int:
        """Jobs that would start at once."""
        return sum(worker.is_free for worker in self.workers)

    def submit(self, job: Job) -> None:
        """Start a job on a free worker."""
        next(worker for worker in self.workers if worker.is_free).send(job)

    def replies(self, seconds: float) -> list[Reply]:
        """Those that have come, at the latest after so many seconds; "lost" for a dead worker."""
        got = []
        with suppress(queue.Empty):
            got.append(self._taken(*self._told.get(timeout=seconds)))
            while True:
                got.append(self._taken(*self._told.get_nowait()))
        return [reply for reply in got if reply]

    def _taken(self, worker: Worker, reply: Reply | None) -> Reply | None:
        if reply and "ready" in reply:  # it has imported what it needs
            worker.is_ready, self._deaths = True, 0
            return None
        job, worker.job = worker.job, None
        if reply:
            worker.is_leaving = reply["state"] == "interrupted"
            return reply
        self._deaths += not worker.is_ready
        if self._deaths >= MOST_DEATHS:
            lines = worker.log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise UserError(f"workers: they end at once; the last of {worker.log} is: {lines[-1]}")
        index = self.workers.index(worker)
        self.workers[index] = Worker(worker.env, worker.log, self._told)
        return job.lost() if job else None

    def close(self) -> None:
        """End the workers; those that train are interrupted and hand their trials back."""
        for worker in self.workers:
            worker.ask_to_end()
        until = time.monotonic() + PATIENCE
        for worker in self.workers:
            worker.end(until - time.monotonic())


def _path() -> str:
    return os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")]))
