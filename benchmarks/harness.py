"""Contenders measured side by side: interleaved repetitions, medians, tables in Markdown."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.worker import timed

ROOT = Path(__file__).resolve().parents[1]
SHORTEST = 0.2  # seconds a repetition lasts at least
# What would change torch's defaults in a worker.
_UNSET = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LD_PRELOAD")

Repetition = Callable[[], float]
"""Runs once and returns seconds."""
Times = dict[str, list[float]]
"""Seconds of each repetition of each contender."""


class Worker:
    """A contender's own process, started once; it works only while it is asked to."""

    def __init__(self, python: str = sys.executable) -> None:
        kept = {k: v for k, v in os.environ.items() if k not in _UNSET and "MALLOC" not in k}
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker"],
            cwd=ROOT,
            env=kept,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._names = map(str, count())

    def ask(self, **request: Any) -> None:
        """Send a request; `answer` waits for what becomes of it."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The answer to the last request.

        Raises:
            RuntimeError: with the worker's traceback.
        """
        line = self._process.stdout.readline()
        reply = json.loads(line) if line else {"error": "the worker has ended"}
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["value"]

    def call(self, **request: Any) -> Any:
        """Ask and wait."""
        self.ask(**request)
        return self.answer()

    def case(self, make: str, **arguments: Any) -> Repetition:
        """A repetition of the step that `make` ("module:function") builds in the worker."""
        name = next(self._names)
        self.call(make=make, case=name, arguments=arguments)
        return warm(lambda times: self.call(run=name, times=times))

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def warm(run: Callable[[int], float]) -> Repetition:
    """Warm up, then repeat often enough in a row that a repetition is not too short to time.

    Args:
        run: from a number of calls to seconds a call.
    """
    run(1)
    return partial(run, max(1, round(SHORTEST / run(1))))


def here(step: Callable[[], object]) -> Repetition:
    """A repetition of a step in this process, where its state does not matter."""
    return warm(partial(timed, step))


def interleave(contenders: Mapping[str, Repetition], repeats: int) -> Times:
    """Time a, b, ..., a, b, ..., so that what disturbs the machine meets all of them."""
    times: Times = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, repetition in contenders.items():
            times[name].append(repetition())
    return times


def ratio(times: Times, slow: str, fast: str) -> float:
    """How many times faster `fast` is: median over repetitions that ran next to each other."""
    return median(s / f for s, f in zip(times[slow], times[fast], strict=True))


def rate(times: Times, name: str, per_step: float = 1) -> float:
    """Steps a second times `per_step`, by the median repetition."""
    return per_step / median(times[name])


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers are right-aligned columns, the first column is text."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def section(title: str, target: str, *parts: str) -> str:
    """A heading, the target in a line of its own, then paragraphs and tables."""
    return "\n\n".join([f"## {title}", f"Target: {target}", *parts]) + "\n"


def machine() -> str:
    """Processor, cores, versions and date in one line."""
    import torch

    return (
        f"{_processor()}, {os.cpu_count()} cores, no GPU used; torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}; {date.today().isoformat()}"
    )


def _processor() -> str:
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines.splitlines() if ":" in line)
    flags = facts.get("Flags", "").split()
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{facts.get('Model name', platform.machine()).strip()} ({' '.join(wide)})"
