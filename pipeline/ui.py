"""`python -m pipeline.ui`: the MLflow UI on the tracked runs. Floor 5."""

import os
import subprocess
import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from pipeline.cli import main
from pipeline.errors import UserError


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> int:
    """Serve the store on this machine until interrupted.

    Raises:
        UserError: if MLFLOW_TRACKING_URI names a server, which has a UI of its own.
    """
    from pipeline import tracking

    uri = tracking.tracking_uri()
    if uri.startswith("http"):
        raise UserError(f"MLFLOW_TRACKING_URI: {uri} is a server; open that address in a browser")
    client = tracking.connect()
    experiments = client.search_experiments(order_by=["last_update_time DESC"])
    newest = next((e for e in experiments if e.name != "Default"), experiments[0])
    print(f"http://127.0.0.1:{cfg.port}/#/experiments/{newest.experiment_id}/runs", flush=True)
    print("Ctrl-C ends it.", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(cfg.port), "--workers", "1", "--backend-store-uri", uri]
    command += ["--default-artifact-root", str(tracking.MLRUNS / "artifacts")]
    # one process instead of twelve: nothing here needs MLflow's job queue
    lean = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"
    server = subprocess.Popen(command, env={**os.environ, **lean, "PATH": path})
    try:
        return server.wait()
    except KeyboardInterrupt:
        server.terminate()
        return server.wait()


if __name__ == "__main__":
    main("ui", run)
