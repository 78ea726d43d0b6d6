"""Workers on a Ray cluster: a task a trial, on whichever node has room. Floor 5."""

import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.data.pool import PROJECT
from pipeline.errors import UserError
from pipeline.study.worker import Job, Reply, carry_out
from pipeline.tracking import store

_PASSED_ON = ("PIPELINE_DATA", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME",
              "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")  # fmt: skip


class RayExecutor:
    """Trials as Ray tasks; Ray places them and shows each the GPU that it got.

    The code must lie at the same path on every node, and the stores must be reached from all: a
    shared folder, or servers for `storage` and MLFLOW_TRACKING_URI.

    Args:
        address: of the cluster; "auto" finds one on this machine.
        workers: most trials at once; "auto": as many as the cluster has room for.
        workers_per_gpu: trials that share a GPU.
        threads: of a trial where there is no GPU.

    Raises:
        UserError: if Ray is not installed or the cluster is not there.
    """

    def __init__(
        self,
        address: str,
        workers: int | str,
        workers_per_gpu: int,
        use_gpus: bool,
        threads: int = 1,
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError("executor: ray is not installed; pip install '.[ray]'") from error
        self._ray = ray
        _answers(address)
        try:
            ray.init(address=address, runtime_env={"env_vars": _environment(threads)},
                     log_to_driver=False, logging_level=logging.ERROR)  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"address: no Ray cluster at {address} ({str(error).splitlines()[0]}); start one "
                "with `ray start --head`"
            ) from error
        self._workers, self._per_gpu, self._threads = workers, workers_per_gpu, threads
        self._gpus = use_gpus and ray.cluster_resources().get("GPU", 0) > 0
        needs: dict[str, Any] = {"num_cpus": threads}
        if self._gpus:
            needs = {"num_cpus": 1, "num_gpus": 1 / workers_per_gpu}
        # a task that is lost comes back as one, with the checkpoint that it got to
        self._task = ray.remote(max_retries=0, **needs)(_task)
        self._jobs: dict[Any, Job] = {}

    @property
    def slots(self) -> int:
        """Jobs that run at once; grows with the cluster."""
        has = self._ray.cluster_resources()
        room = (
            has.get("GPU", 0) * self._per_gpu if self._gpus else has.get("CPU", 1) // self._threads
        )
        return max(1, int(room if self._workers == "auto" else min(room, int(self._workers))))

    def free(self) -> int:
        """Jobs that would start at once."""
        return self.slots - len(self._jobs)

    def submit(self, job: Job) -> None:
        """Hand a job to Ray."""
        self._jobs[self._task.remote(job._asdict())] = job

    def replies(self, seconds: float) -> list[Reply]:
        """Those that have come, at the latest after so many seconds; "lost" for a dead task."""
        if not self._jobs:
            time.sleep(seconds)
            return []
        done, _ = self._ray.wait(list(self._jobs), timeout=seconds, num_returns=1)
        got = []
        for ref in done:
            job = self._jobs.pop(ref)
            try:
                got.append(self._ray.get(ref))
            except self._ray.exceptions.RayError as error:
                reason = str(error).splitlines()[0][:200]
                got.append(job.lost(reason))
        return got

    def close(self) -> None:
        """Interrupt what runs and leave the cluster."""
        if not self._ray.is_initialized():
            return
        for ref in self._jobs:
            self._ray.cancel(ref, force=False)
        with suppress(self._ray.exceptions.RayError):
            self._ray.wait(list(self._jobs), num_returns=max(1, len(self._jobs)), timeout=120)
        self._jobs = {}
        self._ray.shutdown()


def _answers(address: str) -> None:
    """Ray itself tries for many minutes to reach a cluster that has died.

    Raises:
        UserError: if nothing listens at the address, or at the one that "auto" stands for.
    """
    if address == "auto":
        noted = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        found = noted.read_text().strip() if noted.exists() else ""
        address = os.environ.get("RAY_ADDRESS", found)
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return  # Ray says what it is
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"address: no Ray cluster answers at {address} ({error}); start one with `ray start "
            "--head`"
        ) from error


def _task(job: dict[str, Any]) -> Reply:
    return carry_out(Job(**job))


def _environment(threads: int) -> dict[str, str]:
    kept = {k: os.environ[k] for k in _PASSED_ON if k in os.environ}
    here = {"PYTHONPATH": str(PROJECT), "PIPELINE_MLRUNS": str(store.MLRUNS)}
    return {**kept, **here, "OMP_NUM_THREADS": str(threads)}
