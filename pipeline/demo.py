"""`python -m pipeline.demo`: a page to try a learner on one's own photos. Floor 5."""

import importlib.util
import ipaddress
import mimetypes
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.ui import check_port

if TYPE_CHECKING:
    from pipeline.trained import Given

SILENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Serve the page until interrupted.

    Raises:
        UserError: for bad input, if the port is taken, or if Gradio is not installed.
    """
    from pipeline import config

    config.check_root(cfg, "demo")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("demo: gradio is not installed; pip install '.[demo]'")
    check_port(cfg.port, cfg.host)
    from pipeline.tracking.run import sigterm_interrupts
    from pipeline.train import quieten
    from pipeline.trained import given_learner

    quieten()
    given = given_learner(cfg)
    if not is_loopback(cfg.host):
        print(
            f"warning: host={cfg.host}: whoever reaches this machine can use the page; it asks for "
            "no password",
            file=sys.stderr,
        )
    try:
        with sigterm_interrupts(), tempfile.TemporaryDirectory(prefix="photos-") as folder:
            serve(given, cfg, Path(folder))
    except KeyboardInterrupt:
        return


def is_loopback(host: str) -> bool:
    """Whether an address reaches no further than this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def serve(given: "Given", cfg: DictConfig, folder: Path) -> None:
    """Launch the page and wait for an interrupt; uploads go to `folder`.

    Raises:
        UserError: if the port was taken meanwhile.
    """
    os.environ |= SILENT | {"GRADIO_TEMP_DIR": str(folder)}  # read when it is imported
    for kind in ("heic", "heif", "avif"):  # let through as images, to be refused by name
        mimetypes.add_type(f"image/{kind}", f".{kind}")
    import gradio as gr

    from pipeline.demo_page import build

    sans, mono = ["system-ui", "sans-serif"], ["monospace"]  # no font is loaded
    theme = gr.themes.Default(primary_hue="blue", font=sans, font_mono=mono)
    page = build(given, cfg, folder).queue(max_size=50, api_open=False)
    try:
        _, url, _ = page.launch(
            server_name=cfg.host,
            server_port=cfg.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=cfg.max_mb * 2**20,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            state_session_capacity=50,
            theme=theme,
            css_paths=Path(__file__).with_name("templates") / "trial.css",
        )
    except OSError as error:
        raise UserError(f"port: {cfg.host}:{cfg.port} cannot be used ({error})") from error
    print(f"page  {url}\nCtrl-C ends it.", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    main("demo", run)
