"""How the tasks of a meta-batch are run: side by side on threads, or stacked by vmap. Floor 1.

Two modes, equal in float64 to 1e-9. *loop* takes task by task, so its memory does not grow with
the meta-batch; on a CPU the tasks are dealt to threads, each with its share of torch's operator
threads, which wastes less than splitting every small operator. *vmap* stacks tasks in chunks, for
a GPU that a single task does not fill.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

Engine = Literal["auto", "loop", "vmap"]
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
R = TypeVar("R")


def resolve(engine: Engine, device: torch.device) -> Literal["loop", "vmap"]:
    """What `auto` stands for: vmap on CUDA, else the loop, which is twice as fast on a CPU."""
    if engine != "auto":
        return engine
    return "vmap" if device.type == "cuda" else "loop"


def keep_freed_memory() -> None:
    """Let glibc keep what torch frees for the next step (Linux; elsewhere nothing).

    It gives blocks of some MiB, the size of Conv4's activations, back to the kernel, and the next
    step faults every page in again: up to a fifth of its time.
    """
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8  # malloc.h
            libc.mallopt(m_mmap_threshold, 32 * 2**20)  # the most it takes
            libc.mallopt(m_trim_threshold, 2**31 - 1)
            libc.mallopt(m_arena_max, 1)  # the threads of `each_task` share what is kept


def each_task(module: M, work: Callable[[M, T], R], tasks: Sequence[T]) -> Iterator[R]:
    """`work(module, task)` of every task, in order.

    On a CPU several tasks run at once, unless the module draws random numbers (dropout), whose
    order would then be chance. Each runs on a twin of the module, because `functional_call`
    changes the module it is given for a while; autocast and gradient modes are as here.

    Args:
        work: reads the module's parameters, and writes none.
    """
    threads = min(torch.get_num_threads(), len(tasks))
    parameter = next(module.parameters(), None)
    on_cpu = parameter is None or parameter.device.type == "cpu"
    if threads < 2 or not on_cpu or _draws(module, work, tasks[0]):
        for task in tasks:
            yield work(module, task)
        return
    modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    cast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def here(task: T) -> R:
        with (
            torch.inference_mode(modes[0]),
            torch.set_grad_enabled(modes[1]),
            torch.autocast("cpu", enabled=cast[0], dtype=cast[1], cache_enabled=False),
        ):
            return work(twin(module), task)

    operator_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of the caller's own sums: a second thread would wait by spinning
    try:
        yield from _threads(threads, operator_threads // threads).map(here, tasks)
    finally:
        torch.set_num_threads(operator_threads)


def _draws(module: M, work: Callable[[M, T], R], task: T) -> bool:
    """Whether the module takes from torch's random numbers: tried out once in either mode."""
    known: dict[bool, bool] = module.__dict__.setdefault("_draws_random", {})
    if module.training not in known:
        before = torch.get_rng_state()
        work(module, task)
        known[module.training] = not torch.equal(before, torch.get_rng_state())
        torch.set_rng_state(before)
    return known[module.training]


@cache
def _threads(number: int, operator_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, "task", lambda: torch.set_num_threads(operator_threads))


def twin(module: M) -> M:
    """The same module tree as new objects that share parameters, buffers and settings."""
    copy = module.__new__(type(module))
    copy.__dict__ = module.__dict__ | {
        "_parameters": module._parameters.copy(),
        "_buffers": module._buffers.copy(),
        "_modules": {k: child and twin(child) for k, child in module._modules.items()},
    }
    return copy


def chunks(tasks: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover the tasks."""
    return (slice(start, min(start + size, tasks)) for start in range(0, tasks, size))


class ChunkSize:
    """How many tasks `vmap` may stack: what free memory holds, by the peak of one task.

    On a CPU all of them. On CUDA one task is run alone at first, for each shape and mode.
    """

    def __init__(self) -> None:
        self._sizes: dict[object, int] = {}

    def __call__(self, key: object, one: Callable[[], object], x: Tensor) -> int:
        """Tasks in a chunk.

        Args:
            key: what the memory of a task depends on.
            one: runs a single task.
            x: (tasks, ...) on the device that is used.
        """
        if x.device.type != "cuda":
            return len(x)
        if key not in self._sizes:
            torch.cuda.reset_peak_memory_stats(x.device)
            before = torch.cuda.memory_allocated(x.device)
            with torch.random.fork_rng([x.device]):  # what it draws, it draws for nothing
                one()
            bytes_a_task = torch.cuda.max_memory_allocated(x.device) - before
            cached = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
            free = torch.cuda.mem_get_info(x.device)[0] + cached
            self._sizes[key] = tasks_that_fit(bytes_a_task, free, len(x))
        return self._sizes[key]


def tasks_that_fit(bytes_a_task: int, free: int, tasks: int) -> int:
    """At least 1 and at most `tasks`, within 80 % of the free bytes, in chunks of even size."""
    most = max(1, min(tasks, int(0.8 * free / max(1, bytes_a_task))))
    return -(-tasks // -(-tasks // most))
