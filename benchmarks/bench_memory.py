"""Does the memory of a training step stay flat as the meta-batch grows?

Peak resident memory above the state before a step of MAML (28x28 grey, 5-way 1-shot, 15 queries,
Conv4-64), of ours (gradients task by task) and of the usual way (all losses, then one backward).
Every case is a process of its own.
"""

import ctypes
import multiprocessing
import sys
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path

from benchmarks import ours, peers
from benchmarks.harness import section, table

TITLE = "Memory of a training step"
TARGET = "flat in the meta-batch: ours at 32 tasks within 15 % of ours at 4."
META_BATCHES = (1, 4, 16, 32)
KINDS = {"maml": "MAML", "fomaml": "FOMAML"}
WAYS_OF = {"ours": ours.gradient_step, "one backward": peers.gradient_step}
HEADER = ["peak of a step, MiB", *(f"{n} task{'s' * (n > 1)}" for n in META_BATCHES), "32 over 4"]
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(step: Callable[[], object], times: int) -> int:
    """Bytes of resident memory that a step takes at most, above what there was before."""

    def work() -> None:
        for _ in range(times):
            step()

    release_free_memory()
    try:
        _RESET.write_text("5")  # the kernel forgets the peak so far
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before
    except OSError:
        return _sampled_peak(work)


def _status(key: str) -> int:
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _sampled_peak(work: Callable[[], object]) -> int:
    """The same where the kernel does not keep the peak: looked at every millisecond."""
    import psutil

    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return highest - before


def release_free_memory() -> None:
    """Give back what the warm-up left, or a step could take it unseen."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def measure(way: str, learner: str, steps: int, tasks: int) -> int:
    """Peak of one case; runs in a fresh process."""
    task = dict(learner=learner, channels=1, size=28, k_shot=1, steps=steps)
    more = {} if way == "ours" else {"stacked": True}
    warm_up = WAYS_OF[way](**task, tasks=2, n_query=1, **more)  # loads code, starts threads
    step = WAYS_OF[way](**task, tasks=tasks, **more)
    warm_up()
    # The peaks of tasks on several threads do not always meet: give a small step its chances.
    return peak(step, times=1 if more else max(1, 8 // tasks))


def fresh(*case: object) -> int:
    """`measure` in a fork of this process, which has imported everything and computed nothing."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(measure(*case)))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def main() -> str:
    """The section of the report."""
    rows = []
    for learner, steps, way in product(KINDS, (1, 5), WAYS_OF):
        peaks = [fresh(way, learner, steps, n) for n in META_BATCHES]
        label = f"{KINDS[learner]}, {steps} step{'s' * (steps > 1)}, {way}"
        sizes = [f"{size / 2**20:.0f}" for size in peaks]
        rows.append([label, *sizes, f"**{peaks[-1] / peaks[1]:.2f}**"])
    notes = (
        "The images of the meta-batch exist before the step and are not counted. Ours runs as many "
        "tasks at once as there are threads, so one task alone takes less; small meta-batches: the "
        "highest of several steps."
    )
    return section(TITLE, TARGET, table(HEADER, rows), notes)


if __name__ == "__main__":
    print(main())
