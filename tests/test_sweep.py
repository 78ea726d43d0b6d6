"""Sweeps: what is searched, who runs it, and what happens when workers and drivers are killed."""

import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from itertools import cycle
from types import SimpleNamespace

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from pipeline import sweep
from pipeline.compose import CONF, compose_config
from pipeline.errors import UserError
from pipeline.study import local, search, settings, storage
from pipeline.study.driver import Driver, default_job
from pipeline.study.space import Dimension, corners, defaults, suggest
from pipeline.study.worker import Job
from pipeline.tracking import store
from tests.test_train import REPO, SMALL

LEARNERS = sorted(p.stem for p in (CONF / "learner").glob("*.yaml"))
TRAINED = [
    name for name in LEARNERS if "optimizer" in compose_config("train", [f"learner={name}"]).learner
]


@pytest.fixture(autouse=True)
def _no_connection_stays(monkeypatch):
    opened, real = [], storage.open_storage
    monkeypatch.setattr(storage, "open_storage", lambda *a: opened.append(real(*a)) or opened[-1])
    yield
    for each in opened:
        each.remove_session()
        each.engine.dispose()


def composed(*overrides: str) -> settings.Settings:
    return settings.read(compose_config("sweep", overrides), overrides)


# --- what is searched


@pytest.mark.parametrize("learner", TRAINED)
def test_every_learner_has_a_space_of_valid_values(learner):
    """The rates first; each bound is a training that would be accepted."""
    from pipeline import config

    made = composed(f"learner={learner}")
    assert "lr" in made.space[0].key
    assert defaults(made.space, made.cfg) is not None, "its own values lie in its space"
    for values in corners(made.space):
        config.check(
            compose_config(
                "train",
                [f"learner={learner}", *(f"{k}={json.dumps(v)}" for k, v in values.items())],
            )
        )


def test_a_learner_without_training_cannot_be_swept():
    with pytest.raises(UserError, match="learner: PixelCentroid has nothing to train"):
        composed("learner=pixel_centroid", "+space.learner.lr={low:0.1,high:1}")


def test_space_on_the_command_line():
    made = composed(
        "learner=maml", "space.learner.inner_lr.high=2", "~space.learner.inner_steps",
        "+space.data.k_shot={choices:[1,5]}", "n_trials=3", "trainer.max_steps=400",
    )  # fmt: skip
    keys = {d.key: d for d in made.space}
    assert list(keys) == ["learner.inner_lr", "learner.optimizer.lr", "data.k_shot"]
    assert keys["learner.inner_lr"].high == 2
    assert made.overrides == ["learner=maml", "trainer.max_steps=400"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("space.learner.inner_lr.low=0", "space.learner.inner_lr: found .*; log needs low > 0"),
        ("space.learner.inner_lr.low=3", "space.learner.inner_lr: found .*; needs low <= high"),
        ("space.learner.inner_lr.low=x", "space.learner.inner_lr.low: found x; Input should be a"),
        ("+space.learner.inner_lr.lo=1", "space.learner.inner_lr.lo: found 1; Extra inputs"),
        (
            "+space.learner.typo={low:1,high:2}",
            "space.learner.typo: no key learner.typo in the conf",
        ),
        (
            "+space.data.k_shot={choices:[1],when:{learner.typo:1}}",
            "space.data.k_shot.when: no key",
        ),
        ("space.learner.inner_lr=0.1", "space.learner.inner_lr: found 0.1; needs low and high, or"),
        ("n_trials=0", "n_trials: found 0; Input should be greater than or equal to 1"),
        ("sampler=best", "sampler: found 'best'; Input should be 'tpe', 'gp'"),
        ("test=true", "test=true: a trial is never tested"),
        ("resume=abc", "resume=abc: the same command goes on"),
        ("trainer.devices=2", "trainer.devices: found 2; each trial of a sweep has one device"),
        ("objectives=[adapt_seconds]", r"objectives: found .*; allowed are \[val/acc\] and"),
        ("objectives=null", "objectives: found None; allowed are"),
        ("study=a/b", "study: found 'a/b'; String should match"),
    ],
)
def test_bad_settings_are_named(override, line):
    with pytest.raises(UserError, match=line):
        composed("learner=maml", override)


def test_a_grid_has_as_many_trials_as_points():
    with pytest.raises(UserError, match="n_trials: found 76; the grid of this space has 75"):
        composed("learner=maml", "sampler=grid", "n_trials=76")


def test_a_condition_decides_whether_a_dimension_takes_part():
    space = [
        Dimension(key="learner.first_order", choices=[True, False]),
        Dimension(key="learner.inner_steps", low=1, high=3, when={"learner.first_order": True}),
        Dimension(key="learner.inner_lr", low=0.1, high=0.2, when={"learner.adapted": "head"}),
    ]
    cfg = compose_config("train", ["learner=maml"])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [suggest(study.ask(), space, cfg) for _ in range(20)]
    assert {"learner.inner_lr"} & set().union(*drawn) == set()  # adapted is "all" here
    for values in drawn:
        assert ("learner.inner_steps" in values) == values["learner.first_order"]


def test_a_rate_between_whole_numbers_is_a_rate():
    ends = ["space.learner.inner_lr.low=1", "space.learner.inner_lr.high=3"]
    assert composed("learner=maml", *ends).space[0].low == 1.0
    assert not composed("learner=maml", *ends).space[0].whole
    assert composed("learner=maml").space[2].whole  # inner_steps


def test_grids_cover_their_range():
    assert Dimension(key="k", low=1, high=4).grid() == [1, 2, 3, 4]
    assert Dimension(key="k", low=1, high=9, step=4).grid() == [1, 5, 9]
    assert Dimension(key="k", low=0.0, high=1.0, step=0.5).grid() == [0.0, 0.5, 1.0]
    rates = Dimension(key="k", low=1e-4, high=1.0, log=True).grid()
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_a_study_is_named_by_what_makes_it():
    first = composed("learner=maml")
    assert first.name.startswith("maml-glyphs-")
    assert composed("learner=maml", "n_trials=99", "workers=1").name == first.name
    assert composed("learner=maml", "space.learner.inner_lr.high=2").name != first.name
    assert composed("learner=maml", "data.k_shot=5").name != first.name


def test_places_of_workers(monkeypatch):
    monkeypatch.setattr(local, "cores", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    both = local.environments("auto", 2, True, most=9)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in both] == ["2", "2", "5", "5"]
    assert {e["OMP_NUM_THREADS"] for e in both} == {"2"}
    with pytest.raises(UserError, match="workers: found 5; 2 GPUs with workers_per_gpu=2 take 4"):
        local.environments(5, 2, True, most=9)
    cpu = local.environments(4, 1, False, most=9)
    assert [(e["CUDA_VISIBLE_DEVICES"], e["OMP_NUM_THREADS"]) for e in cpu] == [("", "2")] * 4
    few = local.environments(4, 1, False, most=2)
    assert [e["OMP_NUM_THREADS"] for e in few] == ["4"] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.gpus() == []


# --- the driver, with workers that train nothing


class Nobody:
    """A parent run and a progress that take everything."""

    run_id, experiment_id = "", "0"

    def __getattr__(self, name: str):
        return lambda *a, **k: None


class Pretended:
    """Workers as threads that sleep and tell; some die, some are stopped, some fail in turn."""

    def __init__(
        self, study, database, slots=3, seed=0, fates=("", "lost", "", "interrupted", "failed")
    ):
        self.study, self.storage, self.slots = study, database, slots
        self.random, self.fates = random.Random(seed), cycle(fates)
        self.at_work, self.done = 0, queue.SimpleQueue()

    def free(self):
        return self.slots - self.at_work

    def submit(self, job: Job):
        self.at_work += 1
        fate = next(self.fates) or "complete"
        threading.Thread(target=self._work, args=(job, fate, self.random.random() / 20)).start()

    def _work(self, job: Job, fate: str, seconds: float):
        time.sleep(seconds)
        reply = {"trial": job.trial, "values": job.values, "state": fate, "error": "on purpose"}
        if fate == "interrupted":
            storage.requeue(self.storage, self.study, job.trial)
        elif fate != "lost":
            state = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}[fate]
            value = job.values[0]["learner.inner_lr"] if fate == "complete" else None
            self.study.tell(job.trial, value, state=state)
        self.done.put(reply)

    def replies(self, seconds):
        try:
            reply = self.done.get(timeout=seconds)
        except queue.Empty:
            return []
        self.at_work -= 1
        return [reply]

    def close(self):
        pass


def a_driver(url: str, made: settings.Settings, **pretended) -> Driver:
    database = storage.open_storage(url, 60, 3)
    study = search.make_study(made, database, settings.fingerprint(made.cfg, made.space))
    job = default_job(made, url, {})
    nobody = Nobody()
    workers = Pretended(study, database, **pretended)
    return Driver(made, study, database, workers, job, nobody, nobody, time.monotonic())


@pytest.fixture
def no_runs(monkeypatch):
    from pipeline.study import driver

    monkeypatch.setattr(driver, "close_dead", lambda *a: None)
    monkeypatch.setattr(driver, "MOST_FAILURES", 1000)


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "grid"])
def test_exactly_n_trials_end_whatever_happens(tmp_path, no_runs, sampler):
    made = composed("learner=maml", "n_trials=12", f"sampler={sampler}", "attempts=99")
    url = f"sqlite:///{tmp_path}/optuna.db"
    storage.prepare(url, tmp_path)
    driver = a_driver(url, made)
    driver.run()
    trials = driver.study.get_trials()
    ended = [t for t in trials if t.state in storage.FINISHED]
    assert len(ended) == 12
    assert not [t for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    taken_up = {t.user_attrs["continues"]: t for t in trials if "continues" in t.user_attrs}
    assert taken_up, "some were lost or stopped"
    for number, again in taken_up.items():
        assert again.params == trials[number].params
        assert trials[number].state == TrialState.FAIL
    if sampler == "grid":
        assert len({tuple(t.params.values()) for t in ended}) == 12
    made = composed("learner=maml", "n_trials=14", f"sampler={sampler}", "attempts=99")
    more = a_driver(url, made)
    more.run()  # goes on
    ended = [t for t in more.study.get_trials() if t.state in storage.FINISHED]
    assert len(ended) == 14
    assert len({t.params["learner.inner_lr"] for t in ended}) >= (14 if sampler != "grid" else 2)


def test_one_driver_at_a_time_on_sqlite(tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    again = storage.only_driver(url, "mine", tmp_path)
    with (
        storage.only_driver(url, "mine", tmp_path),
        pytest.raises(UserError, match="study: another"),
    ):
        again.__enter__()
    with storage.only_driver(url, "mine", tmp_path):
        pass


def test_values_that_kill_their_worker_are_given_up(tmp_path, no_runs, monkeypatch):
    made = composed("learner=maml", "n_trials=3", "attempts=2", "sampler=random")
    url = f"sqlite:///{tmp_path}/optuna.db"
    storage.prepare(url, tmp_path)
    driver = a_driver(url, made, fates=[""])
    work, deadly = driver.executor._work, set()

    def dies(job, fate, seconds):
        if not deadly:
            deadly.add(job.values[0]["learner.inner_lr"])
        work(job, "lost" if job.values[0]["learner.inner_lr"] in deadly else fate, seconds)

    monkeypatch.setattr(driver.executor, "_work", dies)
    driver.run()
    trials = driver.study.get_trials()
    killed = [t for t in trials if t.params["learner.inner_lr"] in deadly]
    assert [t.state for t in killed] == [TrialState.FAIL] * 2
    assert sum(t.state == TrialState.COMPLETE for t in trials) == 3


def test_failures_one_after_another_stop_a_sweep(tmp_path, no_runs, monkeypatch):
    from pipeline.study import driver as module

    monkeypatch.setattr(module, "MOST_FAILURES", 3)
    url = f"sqlite:///{tmp_path}/optuna.db"
    storage.prepare(url, tmp_path)
    driver = a_driver(url, composed("learner=maml", "n_trials=9"), fates=["failed"])
    with pytest.raises(UserError, match=r"trial \d: on purpose"):
        driver.run()
    assert sum(t.state == TrialState.FAIL for t in driver.study.get_trials()) >= 3


def test_a_trial_whose_process_is_gone_is_found(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/optuna.db"
    storage.prepare(url, tmp_path)
    database = storage.open_storage(url, 60, 3)
    study = optuna.create_study(storage=database)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = storage.this_process()
    there = [here[0], child.pid, psutil.Process(child.pid).create_time()]
    for process in (here, there, ["elsewhere", 1, 0.0]):
        study.ask().set_user_attr("process", process)
    study.ask()  # whose driver has not yet said that it is its own
    assert storage.lost_here(study.get_trials(), sole=False) == []
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert storage.lost_here(study.get_trials(), sole=False) == [1]  # a zombie is no worker
    child.communicate()
    assert storage.lost_here(study.get_trials(), sole=False) == [1]
    assert storage.lost_here(study.get_trials(), sole=True) == [1, 3]
    monkeypatch.setattr(storage, "ASKING_SECONDS", 0)
    assert storage.lost_here(study.get_trials(), sole=False) == [1, 3]


def test_workers_that_die_at_work_are_replaced_and_those_that_cannot_start_are_told(
    monkeypatch, tmp_path
):
    def stub(env, log, told):
        return SimpleNamespace(env=env, log=log, job=None, is_ready=False, is_leaving=False)

    monkeypatch.setattr(local, "Worker", stub)
    executor = local.LocalExecutor([{}], tmp_path)
    job = default_job(composed("learner=maml"), "sqlite:///x", {})._replace(trial=7)
    for _ in range(4):  # one after another, each in the middle of a trial
        worker = executor.workers[0]
        assert executor._taken(worker, {"ready": 1}) is None
        worker.job = job
        assert executor._taken(worker, None)["state"] == "lost"
    worker = executor.workers[0]
    executor._taken(worker, {"ready": 1})
    worker.job = job
    executor._taken(worker, {"trial": 7, "state": "interrupted"})
    assert worker.is_leaving  # takes no job while it ends
    assert executor._taken(worker, None) is None
    assert executor.workers[0] is not worker
    (tmp_path / "worker-0.log").write_text("ImportError: no torch\n")
    for _ in range(2):
        executor._taken(executor.workers[0], None)
    with pytest.raises(UserError, match=r"they end at once; .* is: ImportError: no torch"):
        executor._taken(executor.workers[0], None)


def test_a_study_of_other_settings_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    storage.prepare(url, tmp_path)
    database = storage.open_storage(url, 60, 3)
    first = composed("learner=maml", "study=mine")
    search.make_study(first, database, settings.fingerprint(first.cfg, first.space))
    other = composed("learner=anil", "study=mine")
    search.make_study(other, database, "typed wrongly, as long as there is no trial")
    search.make_study(first, database, settings.fingerprint(first.cfg, first.space)).ask()
    with pytest.raises(UserError, match="study: 'mine' was made with other settings"):
        search.make_study(other, database, settings.fingerprint(other.cfg, other.space))


def test_passwords_are_not_shown(tmp_path):
    url = "postgresql+psycopg://me:secret@nowhere.invalid/db"
    made = composed("learner=maml", f"storage={url}")
    assert "secret" not in str(settings.shown(made, url))
    assert storage.shown_url("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db"
    with pytest.raises(UserError, match=r"storage: postgresql.*me:\*\*\*@nowhere") as error:
        storage.open_storage(url.replace("psycopg", "nodriver"), 60, 3)
    assert "secret" not in str(error.value)


def test_a_storage_that_cannot_be_opened():
    with pytest.raises(UserError, match="storage: nonsense cannot be opened"):
        storage.open_storage("nonsense", 60, 3)


# --- whole sweeps

TINY = [
    *SMALL, "data.val_episodes=10", "trainer.max_steps=60", "heartbeat=2", "workers=2",
    "space.data.meta_batch_size.choices=[2,4]",
]  # fmt: skip


def children(parent: str) -> list:
    client = store.connect()
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent}'")


def the_study(made: settings.Settings) -> optuna.Study:
    database = storage.open_storage(storage.local_url(store.MLRUNS), 2, 3)
    return optuna.load_study(study_name=made.name, storage=database)


@pytest.fixture
def start(runs_folder):
    """Starts a sweep in a process of its own, which says at its end whether it imported torch."""
    code = (
        "import sys; from pipeline.cli import main; from pipeline.sweep import run; main('sweep', run);"
        "sys.exit(3 if {'torch', 'pytorch_lightning'} & set(sys.modules) else 0)"
    )
    started = []

    def begin(*overrides: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *overrides], cwd=REPO, text=True,
            env={**os.environ, "PIPELINE_MLRUNS": str(store.MLRUNS)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        wait_until(lambda: list((store.MLRUNS / "sweeps").glob("*/worker-0.log")), process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_until(condition, process: subprocess.Popen, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if process.poll() is not None:
            raise AssertionError(f"the sweep ended: {process.stdout.read()}")
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_kill_9_of_a_worker_and_of_the_driver(start):
    """Nothing lost, trials resumed, exactly n_trials, no run left RUNNING, no torch in the driver."""
    overrides = [*TINY, "n_trials=5", "pruner=none", "retrain_best=true", "retrain_seeds=1"]
    made = composed(*overrides)
    process = start(*overrides)

    def with_checkpoint():
        for trial in trials():
            run_id = trial.user_attrs.get("run_id")
            last = store.MLRUNS / "checkpoints" / str(run_id) / "last.ckpt"
            if trial.state == TrialState.RUNNING and run_id and last.exists():
                return trial
        return None

    def trials():
        try:
            return the_study(made).get_trials(deepcopy=False)
        except KeyError:  # not made yet
            return []

    victim = wait_until(with_checkpoint, process)
    os.kill(victim.user_attrs["process"][1], signal.SIGKILL)
    wait_until(lambda: any(t.user_attrs.get("deaths") for t in trials()), process)
    wait_until(lambda: sum(t.state in storage.FINISHED for t in trials()) >= 2, process)
    wait_until(with_checkpoint, process)
    process.kill()
    process.communicate()
    process = start(*overrides)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out

    found = trials()
    assert sum(t.state == TrialState.COMPLETE for t in found) == 5
    assert not [t for t in found if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    (again,) = [t for t in found if t.user_attrs.get("continues") == victim.number]
    assert again.user_attrs["run_id"] == victim.user_attrs["run_id"]
    parent = the_study(made).user_attrs["run_id"]
    client = store.connect()
    assert client.get_run(parent).info.status == "FINISHED"
    runs = {r.info.run_id: r for r in children(parent)}
    assert {r.info.status for r in runs.values()} <= {"FINISHED", "KILLED"}
    for trial in found:
        if trial.state == TrialState.COMPLETE:
            run_id = trial.user_attrs["run_id"]
            assert runs[run_id].info.status == "FINISHED"
            assert runs[run_id].data.tags["trial"] == str(trial.number)
            assert runs[run_id].data.tags["optuna.state"] == "COMPLETE"
            curve = client.get_metric_history(run_id, "val/acc")
            assert sorted({m.step for m in curve}) == [10, 20, 30, 40, 50, 60]
            assert trial.value == pytest.approx(max(m.value for m in curve))
            assert not any(key.startswith("test/") for key in runs[run_id].data.metrics)
    (best,) = [r for r in runs.values() if "retrained" in r.data.tags]
    assert 0 < best.data.metrics["test/acc"] <= 1
    assert best.data.tags["seed"] == "1"
    assert best.data.params["learner.optimizer.lr"] == str(
        the_study(made).best_params["learner.optimizer.lr"]
    )
    files = {f.path for f in client.list_artifacts(parent, "study")}
    assert {"study/trials.csv", "study/plots.html", "study/importance.json"} <= files
    params = client.get_run(parent).data.params
    assert params["best.learner.optimizer.lr"] == best.data.params["learner.optimizer.lr"]


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_pruned_runs_are_no_failures(start):
    overrides = [*TINY, "n_trials=6", "pruner=median", "sampler=random", "data.val_episodes=30"]
    made = composed(*overrides)
    process = start(*overrides)
    wait_until(lambda: list((store.MLRUNS / "checkpoints").glob("*/last.ckpt")), process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    assert "the same command goes on" in out
    study = the_study(made)
    parent = study.user_attrs["run_id"]
    assert store.connect().get_run(parent).info.status == "KILLED"
    assert {r.info.status for r in children(parent)} <= {"KILLED", "FINISHED"}
    states = {t.state for t in study.get_trials()}
    assert TrialState.WAITING in states
    assert TrialState.RUNNING not in states

    result = sweep.run(made.cfg, overrides)
    assert result["run_id"] == parent
    found = study.get_trials()
    assert sum(t.state in storage.FINISHED for t in found) == 6
    runs = {r.info.run_id: r for r in children(parent)}
    pruned = [t for t in found if t.state == TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        run = runs[trial.user_attrs["run_id"]]
        assert run.info.status == "FINISHED"
        assert run.data.tags["optuna.state"] == "PRUNED"
        assert trial.last_step < 60
    assert result["best_value"] == max(t.value for t in found if t.state == TrialState.COMPLETE)
    store.connect().update_run(parent, "RUNNING")  # as if it had been killed at its end
    assert sweep.run(made.cfg, overrides) == result
    assert store.connect().get_run(parent).info.status == "FINISHED"


def test_bad_values_are_found_before_a_trial_starts(runs_folder):
    rate = "space.learner.optimizer.lr"
    overrides = [*TINY, f"{rate}.low=-1", f"{rate}.log=false"]
    with pytest.raises(UserError) as error:
        sweep.run(compose_config("sweep", overrides), overrides)
    (line,) = str(error.value).splitlines()
    assert (
        line
        == "learner.optimizer.lr: found -1.0; must be greater than 0 (space.learner.optimizer.lr)"
    )
    client = store.connect()
    assert not client.search_runs([e.experiment_id for e in client.search_experiments()])


def test_a_server_that_went_away_does_not_stop_a_sweep(monkeypatch, capsys):
    from pipeline.tracking import study as runs

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    parent = Nobody()
    runs.close_dead(parent, [], others=True)
    runs.name_best(parent, {"learner.inner_lr": 0.1})
    assert runs.view(parent, ["learner.inner_lr"], "acc") is None
    assert capsys.readouterr().err.count("no MLflow server answers") == 3
