"""Runs every benchmark in turn, each in a process of its own, and writes RESULTS.md."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks.harness import ROOT, machine

RESULTS = Path(__file__).parent / "RESULTS.md"
NAMES = (
    "meta_gradients",
    "protonet",
    "episodes",
    "evaluation",
    "processes",
    "memory",
    "peak",
    "stores",
)
HEADING = """# Measured

Written by `make bench` (`python -m benchmarks.run_all`; one table: `python -m
benchmarks.bench_protonet`). Contenders run in turn (a, b, a, b, ...) in one run on one machine, and
the numbers are medians: read the ratios, not the seconds. Where learn2learn is installed for
another Python, `BENCH_L2L_PYTHON=PATH make bench` measures it too.

Leave the machine alone meanwhile. Another program on a core slows an operator that is split over
threads several times, and with it the contenders that split operators: each section ends with how
much of the processor time others took, and a few per cent are too much.
"""


class Load:
    """Whose processor time went by since it was made: this benchmark's, or others'."""

    def __init__(self) -> None:
        self._start, self._before = time.time(), (self._busy(), self._own())

    def others(self) -> float:
        """Share of all cores that other programs took."""
        now = (self._busy(), self._own())
        busy, own = (b - a for a, b in zip(self._before, now, strict=True))
        return max(0.0, busy - own) / (time.time() - self._start) / psutil.cpu_count()

    @staticmethod
    def _busy() -> float:
        spent = psutil.cpu_times()._asdict()
        return sum(
            v for k, v in spent.items() if k not in ("idle", "iowait", "guest", "guest_nice")
        )

    @staticmethod
    def _own() -> float:
        return sum(os.times()[:4])  # with the children that have ended


def run(name: str) -> str:
    """The section of one benchmark.

    Raises:
        SystemExit: with what it printed, if it fails.
    """
    print(f"{name} ...", flush=True)
    load, start = Load(), time.time()
    command = [sys.executable, "-m", f"benchmarks.bench_{name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nerror: benchmark {name} failed")
    others = f"Other programs took {100 * load.others():.0f} % of the processor time."
    print(f"{done.stdout}\n{others}\n{name}: {time.time() - start:.0f} s\n", flush=True)
    return f"{done.stdout.strip()}\n\n{others}\n"


def main() -> None:
    """Run all of them and write the page."""
    start = time.time()
    sections = [run(name) for name in NAMES]
    facts = f"{machine()}. The run took {(time.time() - start) / 60:.0f} minutes.\n"
    RESULTS.write_text("\n".join([HEADING, facts, *sections]))
    print(f"written to {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
