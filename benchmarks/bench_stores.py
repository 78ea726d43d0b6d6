"""What do the stores cost: MLflow a call, Optuna a trial, as writers and trials grow?

Each writer is a process of its own. A call of MLflow logs five metrics at a step; a trial of Optuna
is asked for, reports six times and is told, as a sweep does it. Both in SQLite, as runs are kept
here by default; BENCH_POSTGRES names an empty PostgreSQL database to measure Optuna there too.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import optuna

from benchmarks.harness import Worker, section, table
from pipeline.study import storage
from pipeline.tracking import store

TITLE = "Stores"
TARGET = "none; docs/scale.md says what follows from these."
CALLS, TRIALS = 60, 12
WRITERS = (1, 2, 4)
SIZES = (100, 1_000, 10_000)
HEADER = ["", *(f"{n} writer{'s' * (n > 1)}" for n in WRITERS)]
STUDY_HEADER = ["", *(f"{n:,} trials" for n in SIZES)]


def mlflow_calls(folder: str) -> Callable[[], None]:
    """One call of `log_batch`; runs in a worker."""
    from mlflow.entities import Metric

    store.MLRUNS = Path(folder)
    client = store.connect()
    run = client.create_run(store.experiment_id(client, "bench")).info.run_id
    step = iter(range(10**9))

    def call() -> None:
        at = next(step)
        client.log_batch(run, metrics=[Metric(f"m{i}", 0.5, at, at) for i in range(5)])

    return call


def trials(url: str, seed: int) -> Callable[[], None]:
    """One trial, asked, reported and told; runs in a worker."""
    database = storage.open_storage(url, 60, 3)
    sampler = optuna.samplers.RandomSampler(seed=seed)
    study = optuna.load_study(study_name="bench", storage=database, sampler=sampler)

    def call() -> None:
        trial = study.ask()
        value = trial.suggest_float("lr", 1e-4, 1, log=True)
        database.record_heartbeat(trial._trial_id)
        for step in range(6):
            database.set_trial_intermediate_value(trial._trial_id, step, value)
        study.tell(trial, value)

    return call


def milliseconds(make: str, times: int, arguments: list[dict[str, object]]) -> float:
    """Of a call, with as many writers at once as there are arguments."""
    workers = [Worker() for _ in arguments]
    try:
        for worker, given in zip(workers, arguments, strict=True):
            worker.ask(make=f"benchmarks.bench_stores:{make}", case="call", arguments=given)
        for worker in workers:
            worker.answer()
        for repeat in (2, times):  # the first ones warm up
            for worker in workers:
                worker.ask(run="call", times=repeat)
            seconds = [worker.answer() for worker in workers]
        return 1000 * sum(seconds) / len(seconds)
    finally:
        for worker in workers:
            worker.close()


def made(url: str, folder: Path, size: int = 0) -> optuna.Study:
    """A study, with so many finished trials in it."""
    storage.prepare(url, folder)
    study = optuna.create_study(storage=storage.open_storage(url, 60, 3), study_name="bench")
    space = {"lr": optuna.distributions.FloatDistribution(1e-4, 1, log=True)}
    study.add_trials(
        optuna.create_trial(params={"lr": 10 ** (-4 * (i % 97) / 97)}, distributions=space, value=i)
        for i in range(size)
    )
    return study


def seconds(step: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def grown(folder: Path) -> list[list[object]]:
    """What a driver does again and again, with ever more trials behind it."""
    ask: list[object] = ["ask for a trial (TPE), ms"]
    look: list[object] = ["look at all trials, ms"]
    for size in SIZES:
        study = made(f"sqlite:///{folder}/{size}.db", folder, size)
        study.sampler = optuna.samplers.TPESampler(seed=0)
        study.get_trials(deepcopy=False)

        def suggest(study: optuna.Study = study) -> None:
            study.ask().suggest_float("lr", 1e-4, 1, log=True)

        suggest()
        ask.append(f"{1000 * min(seconds(suggest) for _ in range(3)):.0f}")
        looks = [seconds(lambda study=study: study.get_trials(deepcopy=False)) for _ in range(3)]
        look.append(f"{1000 * min(looks):.0f}")
        study._storage._backend.engine.dispose()
    return [ask, look]


def main() -> str:
    """The section of the report."""
    storage.quieten()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store.MLRUNS = folder
        store.experiment_id(store.connect(), "bench")
        rows: list[list[object]] = [["MLflow, a call, ms"]]
        for n in WRITERS:
            rows[0].append(f"{milliseconds('mlflow_calls', CALLS, [{'folder': name}] * n):.0f}")
        urls = {"SQLite": f"sqlite:///{folder}/optuna.db"}
        if given := os.environ.get("BENCH_POSTGRES"):
            urls["PostgreSQL"] = given
        for kind, url in urls.items():
            made(url, folder)._storage._backend.engine.dispose()
            row: list[object] = [f"Optuna in {kind}, a trial, ms"]
            for n in WRITERS:
                each = [{"url": url, "seed": i} for i in range(n)]
                row.append(f"{milliseconds('trials', TRIALS, each):.0f}")
            rows.append(row)
        study_rows = grown(folder)
    notes = f"Means of {CALLS} calls or {TRIALS} trials a writer; the last table: best of three."
    return section(TITLE, TARGET, table(HEADER, rows), table(STUDY_HEADER, study_rows), notes)


if __name__ == "__main__":
    print(main())
