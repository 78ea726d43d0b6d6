"""The one live table of a sweep; a line now and then where there is no terminal. Floor 5."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from pipeline.study.storage import FINISHED

LINE_SECONDS = 30


def brief(values: dict[str, object]) -> str:
    """Values of a trial in few characters: the last two parts of a key say enough."""
    parts = []
    for key, value in values.items():
        shown = f"{value:.3g}" if isinstance(value, float) else str(value)
        parts.append(f"{'.'.join(key.split('.')[-2:])}={shown}")
    return " ".join(parts)


class Progress:
    """How far a sweep is.

    Args:
        total: trials that shall end.
        steps: outer steps of a whole training; None if reports do not count steps.
        objective: the first one, by which trials are ranked.
        mode: which of two values of it is the better one.
    """

    def __init__(
        self, name: str, total: int, steps: int | None, objective: str, mode: Literal["max", "min"]
    ) -> None:
        self.name, self.total, self.steps = name, total, steps
        self.objective, self._best = objective, max if mode == "max" else min
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._tty = sys.stdout.isatty()
        self._next, self._told = 0.0, 0

    def __enter__(self) -> "Progress":
        if self._tty:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def show(self, trials: Sequence[FrozenTrial], slots: int) -> None:
        """Trials as they are, so many of them at a time."""
        done = sum(t.state in FINISHED for t in trials)
        head = self._head(trials, slots)
        if self._tty:
            self._live.update(Group(head, self._running(trials)), refresh=True)
        elif done != self._told or time.monotonic() > self._next:
            self._told, self._next = done, time.monotonic() + LINE_SECONDS
            print(head, flush=True)

    def _head(self, trials: Sequence[FrozenTrial], slots: int) -> str:
        states = Counter(t.state for t in trials)
        done = states[TrialState.COMPLETE] + states[TrialState.PRUNED]
        parts = [f"{self.name}  {done}/{self.total} done"]
        for name in ("pruned", "running", "waiting", "fail"):
            if count := states[TrialState[name.upper()]]:
                parts.append(f"{count} {name}")
        if found := [t.values[0] for t in trials if t.state == TrialState.COMPLETE]:
            parts.append(f"best {self._best(found):.4f}")
        if left := self._left(trials, done, slots):
            parts.append(f"{int(left // 60)}:{int(left % 60):02d} left")
        return "  ".join(parts)

    def _left(self, trials: Sequence[FrozenTrial], done: int, slots: int) -> float | None:
        """Seconds, by what a trial took so far."""
        took = [t.duration.total_seconds() for t in trials if t.state in FINISHED and t.duration]
        return sum(took) / len(took) * (self.total - done) / slots if took else None

    def _running(self, trials: Sequence[FrozenTrial]) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("trial", "since", "step", self.objective, "values"):
            table.add_column(name, justify="left" if name == "values" else "right")
        for trial in trials:
            if trial.state != TrialState.RUNNING:
                continue
            begun = trial.datetime_start or datetime.now()
            since = max(0, int((datetime.now() - begun).total_seconds()))
            step = trial.last_step
            acc = "" if step is None else f"{trial.intermediate_values[step]:.4f}"
            far = "" if step is None or not self.steps else f"{step}/{self.steps}"
            shown = brief(trial.params)
            table.add_row(str(trial.number), f"{since // 60}:{since % 60:02d}", far, acc, shown)
        return table
