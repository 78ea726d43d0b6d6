"""What a run has around it: machine, versions, commit, and its load on the machine."""

import getpass
import platform
import socket
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.pool import PROJECT
from pipeline.tracking import store

if TYPE_CHECKING:
    from pipeline.tracking.run import Run

_PACKAGES = ("torch", "torchvision", "pytorch-lightning", "mlflow", "meta-learning-pipeline")


def environment() -> dict[str, str]:
    """Tags: machine, user, versions of Python and packages, commit."""
    tags = {
        "host": socket.gethostname(),
        "version.python": platform.python_version(),
        "mlflow.source.type": "LOCAL",  # these three have a place of their own in MLflow's UI
        "mlflow.source.name": Path(sys.argv[0]).name,
    }
    with suppress(OSError, KeyError):  # a user id without a name
        tags["mlflow.user"] = getpass.getuser()
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            tags[f"version.{package}"] = metadata.version(package)
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        tags["git.commit"] = tags["mlflow.source.git.commit"] = _git("rev-parse", "HEAD")
        tags["git.dirty"] = str(bool(_git("status", "--porcelain"))).lower()
    return tags


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PROJECT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def start_monitor(run: "Run", resumed: bool) -> Any:
    """Start to log system metrics to a run; None where psutil is missing.

    Args:
        run: gets them.
        resumed: whether it has some already, after which the steps go on.
    """
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

    monitor = Monitor(run.run_id, resume_logging=resumed, tracking_uri=store.tracking_uri())
    monitor.start()
    return monitor
