"""`python -m pipeline.ui`: the MLflow UI on the tracked runs. Floor 5."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from pipeline.cli import main
from pipeline.errors import UserError


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Serve the store on this machine until interrupted.

    Raises:
        UserError: if MLFLOW_TRACKING_URI names a server, which has a UI of its own, if the port is
            none or taken, or if the server ends by itself.
    """
    from pipeline.tracking import store
    from pipeline.tracking.run import sigterm_interrupts

    uri = store.tracking_uri()
    if uri.startswith("http"):
        raise UserError(f"MLFLOW_TRACKING_URI: {uri} is a server; open that address in a browser")
    check_port(cfg.port)
    client = store.connect()
    experiments = client.search_experiments(order_by=["last_update_time DESC"])
    newest = next((e for e in experiments if e.name != "Default"), experiments[0])
    view = store.share_view(client, newest.experiment_id)
    print(f"runs    http://127.0.0.1:{cfg.port}/{view}", flush=True)
    print(f"charts  http://127.0.0.1:{cfg.port}/{view}{store.CHARTS}", flush=True)
    print("It answers in about ten seconds; Ctrl-C ends it.", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(cfg.port), "--workers", "1", "--backend-store-uri", uri]
    command += ["--default-artifact-root", str(store.MLRUNS / "artifacts")]
    # one process instead of twelve: nothing here needs MLflow's job queue
    lean = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', '')}"
    server = subprocess.Popen(command, env={**os.environ, **lean, "PATH": path})
    try:
        with sigterm_interrupts():
            code = server.wait()
    except KeyboardInterrupt:
        return
    finally:
        server.terminate()
        server.wait()
    raise UserError(
        f"ui: the MLflow server ended by itself with code {code}; its last lines say why"
    )


def check_port(port: object, host: str = "127.0.0.1") -> None:
    """Refuse a port that cannot be listened at.

    Raises:
        UserError: naming the port, or the host if there is no such address here.
    """
    if not isinstance(port, int) or not 1 <= port <= 65535:
        raise UserError(f"port: found {port!r}, allowed are 1 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"host: {host} is no address ({error.strerror})") from error
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"host: {host} is no address of this machine") from error
            raise UserError(
                f"port: {port} is taken ({error.strerror}); try port={port + 1}"
            ) from error


if __name__ == "__main__":
    main("ui", run)
