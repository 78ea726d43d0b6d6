"""How fast are meta-gradients against the mechanism of the other libraries?

One training step (a meta-batch of 4 tasks, 5-way, 15 queries a class, Conv4-64 with max-pool) of
MAML (second order), FOMAML and ANIL. Peers: clone the module, `autograd.grad(create_graph=...)`,
backward a task.

learn2learn itself takes part where it can be imported: by this Python, or by the one that the
environment variable BENCH_L2L_PYTHON names.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product

import torch
from torch import nn

from benchmarks import ours, peers
from benchmarks.harness import Times, Worker, interleave, rate, ratio, section, table

TITLE = "Meta-gradients: MAML, FOMAML, ANIL"
TARGET = (
    "MAML 28x28 1-shot 1 step 2.0 times the peers, 2.8 times in bf16 over their float32; every "
    "other row 1.5 times."
)
REPEATS = 5
TASKS = 4
SHAPES = {"28x28 grey": (1, 28), "32x32 colour": (3, 32)}
NAMES = {"maml": "MAML", "fomaml": "FOMAML", "anil": "ANIL"}
OURS, PEERS, CAST, LIBRARY = "ours", "peers", "peers bf16", "learn2learn"
OURS_STEP, PEERS_STEP = "benchmarks.ours:gradient_step", "benchmarks.peers:gradient_step"
HEADER = ["task", "ours, tasks/s", "peers, tasks/s", "ratio", "lowest-highest", "learn2learn"]


def library_python() -> str | None:
    """A Python that can import learn2learn, if there is one."""
    python = os.environ.get("BENCH_L2L_PYTHON")
    if python is None and importlib.util.find_spec("learn2learn") is None:
        return None
    python = python or sys.executable
    try:
        with Worker(python) as worker:
            task = dict(learner="maml", channels=1, size=28, k_shot=1, steps=1, tasks=1)
            worker.case(PEERS_STEP, library=True, **task)
    except RuntimeError:
        return None
    return python


def row(label: str, times: Times) -> list[str]:
    """Rates by the median repetition, ratio by the median over neighbouring repetitions."""
    each = [p / o for p, o in zip(times[PEERS], times[OURS], strict=True)]
    library = f"{ratio(times, LIBRARY, OURS):.2f}" if LIBRARY in times else "-"
    return [
        label,
        f"{rate(times, OURS, TASKS):.1f}",
        f"{rate(times, PEERS, TASKS):.1f}",
        f"**{ratio(times, PEERS, OURS):.2f}**",
        f"{min(each):.2f}-{max(each):.2f}",
        library,
    ]


def largest_difference() -> float:
    """Of our meta-gradient from the peers' on the same task and weights, in float64, relative."""
    torch.manual_seed(0)
    learner, batch = ours.gradient_learner("maml", 1, 28, k_shot=1, steps=2, tasks=1, n_query=3)
    learner, net = learner.double(), peers.plain_net(1, 28).double()
    # A bias in front of a norm over the batch changes nothing, so ours leaves it out.
    idle = {f"body.{i}.bias" for i, part in enumerate(net.body) if isinstance(part, nn.Conv2d)}
    theirs = [p for name, p in net.named_parameters() if name not in idle]
    mine = list(learner.parameters())
    with torch.no_grad():
        for a, b in zip(mine, theirs, strict=True):
            b.copy_(a)
    batch = batch._replace(support_x=batch.support_x.double(), query_x=batch.query_x.double())
    learner.meta_loss(batch)[0].backward()
    task = (batch.support_x[0], batch.support_y[0], batch.query_x[0], batch.query_y[0])
    peers.maml_loss(peers.Cloned(net, peers.INNER_LR, False), task, 2).backward()
    pairs = zip(mine, theirs, strict=True)
    return max(((a.grad - b.grad).norm() / b.grad.norm()).item() for a, b in pairs)


def measure(task: dict[str, object], library: str | None, bf16: bool = False) -> Times:
    """A row: every contender in a process of its own, new as that of a training; peers float32."""
    task = task | {"tasks": TASKS}
    with ExitStack() as stack:

        def worker(*python: str) -> Worker:
            return stack.enter_context(Worker(*python))

        chosen = {
            OURS: worker().case(OURS_STEP, bf16=bf16, **task),
            PEERS: worker().case(PEERS_STEP, **task),
        }
        if bf16:
            chosen[CAST] = worker().case(PEERS_STEP, bf16=True, **task)
        if library:
            chosen[LIBRARY] = worker(library).case(PEERS_STEP, library=True, **task)
        return interleave(chosen, REPEATS)


def rows(library: str | None) -> Iterator[list[str]]:
    """The table: every learner, image, shot and number of steps; then MAML under autocast."""
    for learner, shape, k_shot, steps in product(NAMES, SHAPES, (1, 5), (1, 5)):
        channels, size = SHAPES[shape]
        task = dict(learner=learner, channels=channels, size=size, k_shot=k_shot, steps=steps)
        counted = f"{steps} step{'s' * (steps > 1)}"
        yield row(f"{NAMES[learner]} {shape}, {k_shot}-shot, {counted}", measure(task, library))
    task = dict(learner="maml", channels=1, size=28, k_shot=1, steps=1)
    label, times = "MAML 28x28 grey, 1-shot, 1 step, bf16", measure(task, library, bf16=True)
    yield row(f"{label}; peers float32", times)
    yield row(f"{label}; peers bf16", {OURS: times[OURS], PEERS: times[CAST]})


def main() -> str:
    """The section of the report."""
    python = library_python()
    library = "ours over learn2learn itself" if python else "not importable"
    notes = (
        f"Medians of {REPEATS} interleaved repetitions, float32 but for the last rows; new "
        "processes for each row. Ratio: ours "
        "over peers, over neighbouring repetitions. Peers: a clone of the module, `autograd.grad`, "
        "one backward a task; NCHW, `nn.BatchNorm2d`, ReLU before the pool. learn2learn: "
        f"{library}. Largest relative difference of a meta-gradient of MAML "
        f"(float64, 2 steps) between ours and the peers': {largest_difference():.0e}."
    )
    return section(TITLE, TARGET, table(HEADER, rows(python)), notes)


if __name__ == "__main__":
    print(main())
