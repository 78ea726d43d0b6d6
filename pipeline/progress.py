"""Where Lightning's numbers go: to the tracked run, a bar on a terminal, or lines. Floor 3."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import Progress

from pipeline.episode import Batch, Images

SCORES = ("val/acc", "val/mse")
"""What checkpoints are chosen by, one of them."""


class TakesMetrics(Protocol):
    """What a `RunLogger` needs of a tracked run."""

    run_id: str

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at a step."""


class RunLogger(Logger):
    """Passes what Lightning logs to a tracked run; parameters are the run's own affair."""

    def __init__(self, run: TakesMetrics) -> None:
        super().__init__()
        self.run = run
        self.trainer: pl.Trainer | None = None  # the one that logs here

    @property
    def name(self) -> str:
        """Unused by the pipeline; Lightning asks for it."""
        return "run"

    @property
    def version(self) -> str:
        """The id of the run."""
        return self.run.run_id

    def log_hyperparams(self, params: object, *args: Any, **kwargs: Any) -> None:
        """Nothing: see `Run.log_params`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """All but the epoch, which is no quantity of its own here, after so many steps done.

        Lightning's own `step` counts from 0, and in a run that goes on one too many.
        """
        values = {k: v for k, v in metrics.items() if k != "epoch"}
        if values:
            self.run.log_metrics(values, self.trainer.global_step if self.trainer else step or 0)


class Throughput(Callback):
    """Logs the speed and the duration of training, in which validation does not count.

    `train/episodes_per_s`, or `train/images_per_s` of learners that train on those, of the steps
    since the last validation (all processes);
    `train/seconds` of all steps, those before a resumption included.
    """

    def __init__(self) -> None:
        self._since, self._done = time.perf_counter(), 0
        self._before = self._seconds = 0.0  # until the last validation, until now

    def state_dict(self) -> dict[str, float]:
        """What a resumed run goes on from."""
        return {"seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """See `state_dict`."""
        self._seconds = state_dict["seconds"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation and checkpoints do not count."""
        self._since, self._done = time.perf_counter(), 0
        self._before = self._seconds

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Count the tasks or images of the batch."""
        self._done += len(batch.id) * trainer.world_size
        spent = time.perf_counter() - self._since
        self._seconds = self._before + spent
        every = trainer.log_every_n_steps or 1  # type: ignore[attr-defined]  # Lightning sets it
        if trainer.global_step % every and not trainer.is_last_batch:
            return  # nobody would look, and Lightning's `log` is a tenth of a small step
        unit = "images" if isinstance(batch, Images) else "episodes"
        pl_module.log(f"train/{unit}_per_s", self._done / spent, prog_bar=True)
        pl_module.log(
            "train/seconds", self._seconds, on_step=False, on_epoch=True, reduce_fx="max",
            sync_dist=True,
        )  # fmt: skip


class StepBar(RichProgressBar):
    """Lightning's bar from validation to validation, with steps instead of epochs."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"after step {self.trainer.global_step} of {self.trainer.max_steps}"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """Without the end of the run's id."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}


class LineProgress(Callback):
    """One line a validation: step, loss, scores, speed and time left."""

    def __init__(self) -> None:
        self._start, self._first = time.perf_counter(), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run does not start at step 0."""
        self._start, self._first = time.perf_counter(), trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print it."""
        if not trainer.is_global_zero or not {*SCORES} & trainer.callback_metrics.keys():
            return  # a resumed run first ends, without validating, the epoch it was stopped after
        step, total = trainer.global_step, trainer.max_steps
        seen = {k: float(v) for k, v in trainer.callback_metrics.items()}
        spent = time.perf_counter() - self._start
        left = spent / max(1, step - self._first) * (total - step)
        parts = [f"step {step}" + (f"/{total}" if total > 0 else "")]
        for key in ("train/loss", "train/acc", *SCORES):
            if key in seen:
                parts.append(f"{key} {seen[key]:.{4 if key in SCORES else 3}f}")
        for unit, form in (("episodes", "{:.1f}"), ("images", "{:.0f}")):
            if (speed := seen.get(f"train/{unit}_per_s")) is not None:
                parts.append(f"{form.format(speed)} {unit}/s")
        if total > 0:
            parts.append(f"{int(left // 60)}:{int(left % 60):02d} left")
        print("  ".join(parts), flush=True)


class Slow:
    """Where there is no bar: a line every half minute while episodes are scored."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self._next = time.monotonic() + 30

    def __call__(self, done: int) -> None:
        """Take note that so many are done."""
        if time.monotonic() > self._next and not sys.stderr.isatty():
            print(f"{self.what}  {done}/{self.total} {self.unit}", flush=True)
            self._next = time.monotonic() + 30


@contextmanager
def scoring(unit: str = "episodes") -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Shows how far scoring is: bars on a terminal, else lines.

    Args:
        unit: what is counted.

    Yields:
        Begins one of them, by what is scored and on how many episodes; answers with what is to be
        told how many are done.
    """
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:

        def begin(what: str, total: int) -> Callable[[int], None]:
            bar, line = bars.add_task(what, total=total), Slow(what, total, unit)

            def done(n: int) -> None:
                bars.update(bar, completed=n)
                line(n)

            return done

        yield begin


def progress_callbacks() -> list[Callback]:
    """Throughput, and the form of progress that fits where the output goes."""
    shown = StepBar(refresh_rate=10) if sys.stdout.isatty() else LineProgress()
    return [Throughput(), shown]
