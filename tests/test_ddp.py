"""trainer=ddp: two processes do what one does with the same meta-batch."""

import os
import signal
import socket
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch

from pipeline.tracking import store
from tests import ddp_worker
from tests.test_train import REPO, SMALL, weights

EQUAL = [case for case in ddp_worker.CASES if case != "running statistics"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, list[dict]]:
    """What each of two processes saw, {case: [rank 0, rank 1]}; torchrun sets these variables."""
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ddp_worker", str(folder)],
            cwd=REPO,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [child.communicate(timeout=120)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, error in zip(children, errors, strict=True):
        assert child.returncode == 0, error
        assert not error
    names = ddp_worker.CASES
    return {n: [torch.load(folder / f"{n}_{rank}.pt") for rank in range(2)] for n in names}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("one")
    return {case: ddp_worker.fit(case, 1, folder / case) for case in EQUAL}


@pytest.mark.parametrize("case", EQUAL)
def test_no_episode_is_seen_twice(case, one, two):
    first, second = (seen["train"] for seen in two[case])
    assert len(first) == len(second) == 8
    everything = list(chain.from_iterable(first + second))
    assert len(everything) == len(set(everything)) == 8 * ddp_worker.TASKS
    for alone, a, b in zip(one[case]["train"], first, second, strict=True):
        assert sorted(alone) == sorted(a + b)  # step by step the same tasks


@pytest.mark.parametrize("case", ddp_worker.CASES)
def test_every_validation_episode_counts_once(case, two):
    a, b = (seen["val"] for seen in two[case])
    assert [sorted(x + y) for x, y in zip(a, b, strict=True)] == [list(range(33))] * 2


@pytest.mark.parametrize("case", EQUAL)
def test_losses_and_weights_are_those_of_one_process(case, one, two):
    """Losses and weights to 1e-9: sums in another order differ by 1e-16 in float64, and eight steps
    follow. To 1e-6 what is averaged in float32; val/acc exactly."""
    alone, (first, second) = one[case], two[case]
    for name in ("train/loss", "train/acc", "val/loss", "val/acc"):
        assert len(alone["curves"][name]) == (8 if name.startswith("train") else 2)
        near = pytest.approx(alone["curves"][name], rel=1e-9 if name == "train/loss" else 1e-6)
        assert first["curves"][name] == near, name
    assert first["curves"]["val/acc"] == alone["curves"]["val/acc"]
    for name, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-9, atol=1e-9)
        assert torch.equal(first["weights"][name], second["weights"][name]), name


def test_running_statistics_are_those_of_process_0(two):
    """And so both validate what is saved; an uneven validation does not leave one waiting."""
    first, second = (seen["weights"] for seen in two["running statistics"])
    assert any("running_mean" in name for name in first)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def in_two_processes(folder: Path, *overrides: str, start: list[str] | None = None):
    """A training of its own with pipes, as a user starts it."""
    start = start or [sys.executable, "-m", "pipeline.train"]
    two = ["trainer=ddp", "trainer.devices=2"]
    env = os.environ | {"PIPELINE_MLRUNS": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*start, *(overrides if "resume" in overrides[0] else (*SMALL, *two, *overrides))],
        cwd=REPO,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # which can be killed as a whole
    )


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("start", [None, [*TORCHRUN, "-m", "pipeline.train"]])
def test_two_processes_make_one_run(runs_folder, start):
    """One MLflow run, one table, one message; bad input is told once and makes none."""
    child = in_two_processes(runs_folder, "run_name=both", start=start)
    out, err = child.communicate(timeout=240)
    assert child.returncode == 0, err
    assert out.count("make ui") == 1
    client = store.connect()
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    assert run.info.status == "FINISHED"
    assert run.data.params["trainer.devices"] == "2"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/acc")] == [10, 20]

    child = in_two_processes(runs_folder, "data.n_way=9", start=start)
    out, err = child.communicate(timeout=240)
    assert child.returncode == (1 if start else 2)  # torchrun has its own
    assert err.count("error: data.n_way: 9 classes a task") == 1
    assert len(client.search_runs(experiments)) == 1


def checkpoint_of(folder: Path, child: subprocess.Popen) -> Path:
    """The last one of a training that goes on, as soon as it is there."""
    deadline = time.monotonic() + 120
    while not (found := list((folder / "checkpoints").glob("*/last.ckpt"))):
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found[0]


@pytest.mark.slow
def test_a_killed_run_of_two_resumes_to_the_same_weights(runs_folder):
    steps = ["trainer.max_steps=60", "test_k_shot=[1]", "data.augmentation.affine=0.1"]
    whole = in_two_processes(runs_folder, *steps)
    err = whole.communicate(timeout=240)[1]
    assert whole.returncode == 0, err
    (expected,) = store.connect().search_runs(["1"])

    child = in_two_processes(runs_folder, *steps)
    last = checkpoint_of(runs_folder, child)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert 0 < torch.load(last, weights_only=True)["global_step"] < 60
    run_id = last.parent.name
    again = in_two_processes(runs_folder, f"resume={run_id}")
    err = again.communicate(timeout=240)[1]
    assert again.returncode == 0, err
    assert store.connect().get_run(run_id).info.status == "FINISHED"
    resumed = weights(run_id, "last")
    for name, value in weights(expected.info.run_id, "last").items():
        assert torch.equal(value, resumed[name]), name

    child = in_two_processes(
        runs_folder, f"resume={run_id}", start=[*TORCHRUN[:-1], "3", "-m", "pipeline.train"]
    )
    err = child.communicate(timeout=240)[1]
    assert err.count("found 2 and 1, but 3 processes were started") == 1, err


@pytest.mark.slow
@pytest.mark.parametrize("start", [None, [*TORCHRUN, "-m", "pipeline.train"]])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_closed_as_killed(runs_folder, start, stop):
    """Ctrl-C reaches all processes, SIGTERM (a batch system, torchrun) any of them."""
    child = in_two_processes(runs_folder, "trainer.max_steps=100000", start=start)
    last = checkpoint_of(runs_folder, child)
    os.killpg(child.pid, stop) if stop == signal.SIGINT else child.send_signal(stop)
    err = child.communicate(timeout=60)[1]
    assert store.connect().get_run(last.parent.name).info.status == "KILLED", err
    assert err.count(f"resume={last.parent.name} goes on") == 1
    assert child.returncode == (1 if start else 130)
