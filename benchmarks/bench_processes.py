"""What does a second process bring?

MAML (28x28 grey, 5-way 1-shot, 15 queries, 1 step) at a fixed meta-batch of 8 tasks: one process
with one thread, two processes (DistributedDataParallel over gloo, 4 tasks each) with one thread
each, and one process with two threads.
"""

import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Repetition, Worker, interleave, rate, ratio, section, table, warm
from benchmarks.ours import gradient_learner
from pipeline.engine import keep_freed_memory
from pipeline.episode import Episode
from pipeline.learners.base import MetaLearner

TITLE = "Processes"
TARGET = "two processes 1.6 times one."
TASKS = 8
REPEATS = 9
ONE, TWO, THREADS = "1 process, 1 thread", "2 processes, 1 thread each", "1 process, 2 threads"
HEADER = ["", "tasks/s", "over 1 process, 1 thread"]


class Objective(nn.Module):
    """The meta-loss as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, learner: MetaLearner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, batch: Episode) -> Tensor:
        return self.learner.meta_loss(batch)[0]


def training_step(threads: int, rank: int, world: int, meeting: str) -> Callable[[], None]:
    """Gradients and Adam step of this process's share; runs in a worker.

    Args:
        meeting: a file by which the processes find each other.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    learner, batch = gradient_learner("maml", 1, 28, k_shot=1, steps=1, tasks=TASKS // world)
    objective: nn.Module = Objective(learner)
    if world > 1:
        at = f"file://{meeting}"
        distributed.init_process_group(
            "gloo", at, rank=rank, world_size=world, timeout=timedelta(minutes=2)
        )
        objective = DistributedDataParallel(objective)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        objective(batch).backward()
        optimizer.step()

    return step


def together(workers: Sequence[Worker], threads: int, meeting: Path) -> Repetition:
    """A repetition in all workers at once; it lasts as long as the slowest."""
    for rank, worker in enumerate(workers):
        task = dict(threads=threads, rank=rank, world=len(workers), meeting=str(meeting))
        worker.ask(make="benchmarks.bench_processes:training_step", case="step", arguments=task)
    for worker in workers:
        worker.answer()

    def run(times: int) -> float:
        for worker in workers:
            worker.ask(run="step", times=times)
        return max(worker.answer() for worker in workers)

    return warm(run)


def main() -> str:
    """The section of the report."""
    workers = [Worker() for _ in range(4)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            at = partial(together, meeting=Path(folder) / "meeting")
            contenders = {
                ONE: at(workers[:1], 1),
                TWO: at(workers[1:3], 1),
                THREADS: at(workers[3:], 2),
            }
            times = interleave(contenders, REPEATS)
    finally:
        for worker in workers:
            worker.close()
    rows = [
        [name, f"{rate(times, name, TASKS):.1f}", f"{ratio(times, ONE, name):.2f}"]
        for name in contenders
    ]
    notes = (
        f"A step is the gradients over {TASKS} tasks in all and an Adam step. Medians of {REPEATS} "
        "interleaved repetitions."
    )
    return section(TITLE, TARGET, table(HEADER, rows), notes)


if __name__ == "__main__":
    print(main())
