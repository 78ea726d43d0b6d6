"""The processes of one run: how many there are, which one speaks, how they end. Floor 4.

They are started by torchrun or srun, all at once, or by Lightning in the first of them.
Imports nothing heavy.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    import pytorch_lightning as pl


def _torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ  # by which Lightning knows it too


def is_local_zero() -> bool:
    """Whether this is the first process of its machine."""
    return (os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0") == "0"


def repeats_errors() -> bool:
    """Whether another process of this machine finds, and reports, the same bad input.

    Not so where Lightning starts the others: the first one has found nothing then.
    """
    return not is_local_zero() and (_torchrun() or "LOCAL_RANK" not in os.environ)


def check_number(trainer: "pl.Trainer") -> None:
    """That as many processes were started as the trainer asks for.

    Raises:
        UserError: if not.
    """
    started = os.environ.get("WORLD_SIZE" if _torchrun() else "SLURM_STEP_NUM_TASKS", "1")
    processes = trainer.num_devices * trainer.num_nodes
    if started not in ("1", str(processes)):
        raise UserError(
            f"trainer.devices, trainer.num_nodes: found {trainer.num_devices} and "
            f"{trainer.num_nodes}, but {started} processes were started, which must be the product"
        )


def end_others(trainer: "pl.Trainer") -> None:
    """Kill the processes that Lightning started here: they may wait for this one for ever.

    Its thread that watches over them would answer by killing this one too, while it closes the run;
    so that thread is shown an empty list.
    """
    started = getattr(trainer.strategy.launcher, "procs", [])
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait()
    started.clear()


@contextmanager
def handling(handler: Any, *signals: int) -> Iterator[None]:
    """Signals go to a handler during the block; not so in a thread, where they are not its own."""
    try:
        before = [signal.signal(each, handler) for each in signals]
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for each, previous in zip(signals, before, strict=True):
            signal.signal(each, previous)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores Ctrl-C and SIGTERM while things are brought to their end."""
    with handling(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
        yield


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Ctrl-C and SIGTERM during the block interrupt at its end."""
    came: list[int] = []
    with handling(lambda number, _: came.append(number), signal.SIGINT, signal.SIGTERM):
        yield
    if came:
        raise KeyboardInterrupt
