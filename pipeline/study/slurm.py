"""Workers on a SLURM cluster: a job a trial, through submitit. Floor 5."""

import time
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.study.worker import Job, Reply, carry_out

PATIENCE = 120  # seconds for interrupted trainings to upload their checkpoints


class SlurmExecutor:
    """Trials as jobs of a batch system; a job that is preempted or lost is begun again.

    Args:
        logs: a folder that all nodes share.
        workers: jobs in the queue at once.
        parameters: what `submitit.AutoExecutor.update_parameters` takes.
        cluster: None is SLURM where there is one; "local" runs processes here, for a trial.

    Raises:
        UserError: if submitit is not installed, there is no SLURM, or a parameter does not exist.
    """

    def __init__(
        self, logs: Path, workers: int, parameters: dict[str, Any], cluster: str | None = "slurm"
    ) -> None:
        try:
            import submitit
        except ImportError as error:
            raise UserError(
                "executor: submitit is not installed; pip install '.[slurm]'"
            ) from error
        try:
            self._executor = submitit.AutoExecutor(logs, cluster=cluster)
            self._executor.update_parameters(name="sweep", **parameters)
        except (RuntimeError, ValueError, NameError, TypeError) as error:
            raise UserError(f"slurm: {' '.join(str(error).split())}") from error
        utils = submitit.core.utils
        self._errors = (utils.UncompletedJobError, utils.FailedJobError)
        self._refused = utils.FailedSubmissionError
        self.slots = workers
        self._jobs: list[tuple[Any, Job]] = []

    def free(self) -> int:
        """Jobs that may be put into the queue."""
        return self.slots - len(self._jobs)

    def submit(self, job: Job) -> None:
        """Put a job into the queue."""
        try:
            self._jobs.append((self._executor.submit(carry_out, job), job))
        except self._refused as error:
            raise UserError(f"slurm: {' '.join(str(error).split())[:300]}") from error

    def replies(self, seconds: float) -> list[Reply]:
        """Those that have come, at the latest after so many seconds; "lost" for a dead job."""
        until = time.monotonic() + seconds
        while not (done := [pair for pair in self._jobs if pair[0].done()]):
            if time.monotonic() > until:
                return []
            time.sleep(0.2)
        got = []
        for pair in done:
            self._jobs.remove(pair)
            handle, job = pair
            try:
                got.append(handle.result())
            except self._errors as error:
                got.append(job.lost(str(error).splitlines()[0][:200]))
        return got

    def close(self) -> None:
        """Take back what waits, interrupt what runs."""
        for handle, _ in self._jobs:
            handle.cancel(check=False)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and not all(handle.done() for handle, _ in self._jobs):
            time.sleep(0.5)
        self._jobs = []
