"""The two ways of running a meta-batch are one function; what they cost is what they promise."""

import gc
import shutil
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import engine
from pipeline.backbones import Conv4
from pipeline.learners.gradient import GradientLearner
from pipeline.learners.maml import Maml
from pipeline.learners.reptile import Reptile
from tests.test_gradients import meta_batch, meta_gradient

ADAM = partial(torch.optim.Adam, lr=1e-3)
LEARNERS = ["maml", "fomaml", "anil", "fo-anil", "reptile sgd", "reptile adam"]


def build(name: str, norm: str, steps: int, mode: str, body: nn.Module | None = None):
    torch.manual_seed(0)
    body = body or Conv4(1, 20, 6, norm, "stride")
    if name.startswith("reptile"):
        inner = partial(torch.optim.SGD, lr=0.05)
        if name.endswith("adam"):
            inner = partial(torch.optim.Adam, lr=0.01, betas=(0.0, 0.999))
        return Reptile(body, 3, inner, steps, steps, 4, ADAM, None, mode).double()
    adapted = "head" if "anil" in name else "all"
    first_order = name.startswith("fo")
    return Maml(body, 3, 0.1, steps, steps, first_order, adapted, ADAM, None, mode).double()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("norm", ["batch_stats", "group", "none"])
@pytest.mark.parametrize("name", LEARNERS)
def test_loop_and_vmap_give_the_same_gradient_and_predictions(name, norm, steps):
    batch, results = meta_batch(0, 1, 2), []
    for mode in ("loop", "vmap"):
        learner = build(name, norm, steps, mode)
        _, loss, acc = learner.meta_loss(batch)
        gradient = meta_gradient(learner, batch)
        with torch.inference_mode():
            logits = learner.eval().predict(batch)
        results.append(gradient | {"loss": loss, "acc": acc.double(), "logits": logits})
    close(*results)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_chunks_change_nothing(size, monkeypatch):
    whole, parts = build("maml", "group", 1, "vmap"), build("maml", "group", 1, "vmap")
    monkeypatch.setattr(parts, "_chunk_size", lambda *_: size)
    batch = meta_batch(0, 1, 2)
    close(meta_gradient(whole, batch), meta_gradient(parts, batch))
    torch.testing.assert_close(whole.predict(batch), parts.predict(batch), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LEARNERS)
def test_threads_give_the_very_same_gradient(name, two_threads):
    batch = meta_batch(0, 1, 2, 3, 4)
    threaded = meta_gradient(build(name, "batch_stats", 2, "loop"), batch)
    torch.set_num_threads(1)
    alone = meta_gradient(build(name, "batch_stats", 2, "loop"), batch)
    assert all(torch.equal(threaded[k], alone[k]) for k in alone)


class Threads(nn.Flatten):
    """Notes which threads it ran on."""

    out_dim = 400
    seen: list[str]

    def forward(self, x):
        self.seen.append(threading.current_thread().name)
        return super().forward(x)


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_keeps_to_one_thread_and_its_order(dropout, two_threads):
    """Threads would draw masks in an order of chance, and a resumed run would not be the same."""
    body = nn.Sequential(Threads(), nn.Dropout(0.5 if dropout else 0.0))
    body.out_dim, body[0].seen = 400, []
    learner, batch, gradients = build("maml", "none", 1, "loop", body), meta_batch(0, 1, 2, 3), []
    learner.meta_loss(batch)  # finds out
    body[0].seen.clear()
    for _ in range(2):
        torch.manual_seed(1)
        gradients.append(meta_gradient(learner, batch))
    assert all(torch.equal(gradients[0][k], gradients[1][k]) for k in gradients[0])
    assert {name.startswith("task") for name in body[0].seen} == {not dropout}


def test_threads_see_the_modes_of_the_caller(two_threads):
    learner, batch = build("maml", "none", 1, "loop").float(), meta_batch(0, 1)
    batch = batch.each(lambda t: t.float() if t.is_floating_point() else t)
    with torch.autocast("cpu", torch.bfloat16):
        half = learner.predict(batch)
    assert half.dtype == torch.bfloat16

    def modes(_: object = None, __: object = None) -> tuple[object, ...]:
        inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        return threading.current_thread().name[:4], inference, gradients

    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            for name, *there in engine.each_task(learner, modes, batch.tasks()):
                assert name == "task"
                assert there == list(modes()[1:])


def test_operator_threads_are_restored_when_a_task_fails(two_threads):
    learner, tasks = nn.Linear(1, 1), [0, 1, 2]
    assert list(engine.each_task(learner, lambda _, task: task, tasks)) == tasks
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):
        list(engine.each_task(learner, lambda _, task: 1 // (task - 1), tasks))
    assert torch.get_num_threads() == 2


def test_an_optimiser_that_mixes_elements_is_not_stacked():
    inner = partial(torch.optim.Adafactor, lr=0.01)
    learner = Reptile(Conv4(1, 20, 6, "group", "stride"), 3, inner, 1, 1, 4, ADAM, None, "vmap")
    assert learner.engine == "loop"


def test_a_twin_shares_parameters_and_nothing_that_a_call_changes():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    copy = engine.twin(module)
    assert copy[0].weight is module[0].weight
    assert copy[1].running_mean is module[1].running_mean
    x = torch.ones(1, 2)
    other = {"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2)}
    torch.func.functional_call(copy.eval(), other, (x,))
    copy[0].weight = nn.Parameter(torch.zeros(2, 2))
    assert module[0].weight.abs().sum() > 0
    assert module.training


class Counter(TorchDispatchMode):
    """Counts operations, and the most bytes that tensors hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.alive = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self._storages:
                self._watch(t.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        self._storages.add(storage._cdata)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, storage: int, size: int) -> None:
        self._storages.discard(storage)
        self.alive -= size


def cost(learner: GradientLearner, *seeds: int) -> Counter:
    batch = meta_batch(*seeds)
    gc.collect()
    with Counter() as counter:
        learner.meta_loss(batch)[0].backward()
    return counter


def test_first_order_builds_no_second_order_graph():
    second = {k: cost(build("maml", "group", k, "loop"), 0) for k in (1, 4)}
    first = {k: cost(build("fomaml", "group", k, "loop"), 0) for k in (1, 4)}
    # a first-order step is a forward and a backward pass; its graph is gone when the next begins
    per_step = {
        c: (x[4].operations - x[1].operations) / 3 for c, x in (("2", second), ("1", first))
    }
    assert per_step["2"] > 2 * per_step["1"]
    assert first[4].peak < 1.1 * first[1].peak
    assert second[4].peak > 1.5 * second[1].peak


def test_the_loop_needs_no_more_memory_for_more_tasks():
    learner = build("maml", "group", 2, "loop")
    few, many = cost(learner, 0, 1), cost(learner, *range(12))
    assert many.operations > 5 * few.operations
    given = sum(t.nbytes for t in meta_batch(*range(10))[:4])  # the images of ten more tasks
    assert many.peak - few.peak < given + 0.01 * few.peak


@pytest.mark.parametrize(("free", "expected"), [(10**9, 8), (70, 5), (45, 3), (1, 1)])
def test_chunks_fit_into_free_memory(free, expected):
    assert engine.tasks_that_fit(10, free, 9 if expected == 5 else 8) == expected


def test_auto_is_the_loop_on_a_cpu_and_vmap_on_cuda():
    assert engine.resolve("auto", torch.device("cpu")) == "loop"
    assert engine.resolve("auto", torch.device("cuda")) == "vmap"
    assert engine.resolve("vmap", torch.device("cpu")) == "vmap"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["maml", "fomaml", "anil"])
def test_compiled_gradients_are_the_same(name):
    batch = meta_batch(0, 1)
    expected = meta_gradient(build(name, "batch_stats", 2, "loop"), batch)
    learner = build(name, "batch_stats", 2, "loop")
    learner.compile_networks()
    close(meta_gradient(learner, batch), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", LEARNERS)
def test_vmap_on_a_gpu_equals_the_loop_on_the_cpu(name):
    batch = meta_batch(0, 1, 2)
    expected = meta_gradient(build(name, "batch_stats", 2, "loop"), batch)
    moved = batch.each(lambda field: field.cuda())._replace(id=batch.id)
    gradient = meta_gradient(build(name, "batch_stats", 2, "auto").cuda(), moved)
    close({k: g.cpu() for k, g in gradient.items()}, expected)
