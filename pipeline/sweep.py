"""`python -m pipeline.sweep`: search for the values that validate best. Floor 5."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.processes import uninterrupted
from pipeline.train import quieten

if TYPE_CHECKING:
    from pathlib import Path

    from optuna.storages import RDBStorage
    from optuna.study import Study

    from pipeline.study.driver import Driver, Executor
    from pipeline.study.settings import Settings
    from pipeline.study.worker import Job
    from pipeline.tracking.run import Run


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run trials until `n_trials` have ended; track the study and print the best.

    Args:
        cfg: a composed `conf/sweep.yaml`.
        overrides: what it was composed with; the trainings are composed with them too.

    Returns:
        `study`, `run_id` of the parent run, `best_value` and `best_params` (of the first
        objective; None without a complete trial).

    Raises:
        UserError: for bad input, or if trials fail one after another.
    """
    quieten()
    from pipeline.study import settings as reading

    settings = reading.read(cfg, overrides)
    from pipeline.study import storage as kept
    from pipeline.study.search import make_study
    from pipeline.study.summary import best_trials, print_best
    from pipeline.tracking import store
    from pipeline.tracking.run import existing_run
    from pipeline.tracking.study import status

    store.connect()
    url = cfg.storage or kept.local_url(store.MLRUNS)
    kept.prepare(url, store.MLRUNS)
    storage = kept.open_storage(url, cfg.heartbeat, cfg.attempts)
    study = make_study(settings, storage, reading.fingerprint(settings.cfg, settings.space))
    logs = store.MLRUNS / "sweeps" / settings.name
    with kept.closing(storage), kept.only_driver(url, settings.name, logs):
        before = study.user_attrs.get("run_id")
        if before and _is_done(cfg, study) and status(before) == "FINISHED":
            with existing_run(before) as parent:
                print_best(settings, study, url, parent, float("nan"))
        else:
            _work_on(settings, study, storage, url, logs)
        best = next(iter(best_trials(study)), None)
        return {
            "study": settings.name,
            "run_id": study.user_attrs["run_id"],
            "best_value": best.values[0] if best else None,
            "best_params": best.params if best else None,
        }


def _is_done(cfg: DictConfig, study: "Study") -> bool:
    from pipeline.study.storage import FINISHED

    return not cfg.retrain_best and len(study.get_trials(states=FINISHED)) >= cfg.n_trials


def _left(cfg: DictConfig, study: "Study") -> int:
    """Trainings that may run side by side, at least one."""
    from pipeline.study.storage import FINISHED

    trials = cfg.n_trials - len(study.get_trials(states=FINISHED))
    return max(1, trials, cfg.retrain_seeds if cfg.retrain_best else 1)


def _work_on(
    settings: "Settings", study: "Study", storage: "RDBStorage", url: str, logs: "Path"
) -> None:
    """Start workers, have them look at the settings, run trials until all have ended."""
    from pipeline.study.driver import Driver, carry_out, default_job
    from pipeline.study.live import Progress
    from pipeline.study.summary import print_best, summarise
    from pipeline.tracking.study import PARENT

    cfg = settings.cfg
    job = default_job(settings, url, {"study": settings.name})
    steps = None if cfg.pruner == "wilcoxon" else cfg.trainer.max_steps
    shown = (settings.name, cfg.n_trials, steps, cfg.objectives[0], settings.mode)
    with ExitStack() as stack:
        begun, executor = time.monotonic(), _make_executor(cfg, logs, _left(cfg, study))
        stack.callback(executor.close)
        print(f"study {settings.name}: {cfg.n_trials} trials, {executor.slots} at once", flush=True)
        print(f"what they print is in {logs}", flush=True)
        list(carry_out(executor, [_checking(job, settings)], cfg.attempts))
        parent = stack.enter_context(_parent_run(settings, study, url))
        job = job._replace(tags={**job.tags, PARENT: parent.run_id})
        progress = stack.enter_context(Progress(*shown))
        driver = Driver(settings, study, storage, executor, job, parent, progress, begun)
        try:
            driver.run()
            if cfg.retrain_best:
                _retrain(driver, study, job)
        except KeyboardInterrupt:
            progress.say("stopping; the same command goes on, trials from their checkpoints")
            raise
        finally:
            with uninterrupted():  # workers get two minutes
                driver.stop()
                summarise(settings, study, parent, driver.efficiency)
        print_best(settings, study, url, parent, driver.efficiency)


@contextmanager
def _parent_run(settings: "Settings", study: "Study", url: str) -> "Iterator[Run]":
    """The run of the study, a new one or the one that it had."""
    from pipeline.study.settings import shown
    from pipeline.study.storage import shown_url
    from pipeline.tracking.run import tracked_run
    from pipeline.tracking.study import status

    measure = settings.cfg.objectives[0].removeprefix("val/")
    tags = {"study": settings.name, "storage": shown_url(url), "measure": measure}
    known = study.user_attrs.get("run_id")
    known = known if status(known) else None
    run = tracked_run(
        settings.cfg.experiment_name, settings.name, shown(settings, url), tags, known
    )
    with run as parent:
        study.set_user_attr("run_id", parent.run_id)
        yield parent


def _checking(job: "Job", settings: "Settings") -> "Job":
    from pipeline.study.space import corners

    return job._replace(kind="check", values=[{}, *corners(settings.space)])


def _make_executor(cfg: DictConfig, logs: "Path", most: int) -> "Executor":
    use_gpus = cfg.trainer.accelerator in ("auto", "gpu", "cuda")
    if cfg.executor == "ray":
        from pipeline.study.ray import RayExecutor

        return RayExecutor(cfg.address, cfg.workers, cfg.workers_per_gpu, use_gpus)
    if cfg.executor == "slurm":
        from omegaconf import OmegaConf

        from pipeline.study.slurm import SlurmExecutor

        if cfg.workers == "auto":
            raise UserError("workers: found 'auto'; with executor=slurm give the jobs at once")
        parameters: Any = OmegaConf.to_container(cfg.slurm)
        return SlurmExecutor(logs, cfg.workers, parameters)
    from pipeline.study.local import LocalExecutor, environments

    return LocalExecutor(environments(cfg.workers, cfg.workers_per_gpu, use_gpus, most), logs)


def _retrain(driver: "Driver", study: "Study", job: "Job") -> None:
    """Train the best values with seeds that no trial had, and test each once.

    The study notes what is done, so that a sweep that was killed meanwhile does the rest.
    """
    from pipeline.study.driver import carry_out
    from pipeline.study.summary import best_trials

    cfg = driver.settings.cfg
    if not (found := best_trials(study)):
        raise UserError("retrain_best: every trial was pruned; a larger n_trials goes on")
    best = found[0]
    what = f"trial {best.number}"
    done = study.user_attrs.get("retrained", {}).get(what, {})
    jobs = []
    for seed in range(cfg.seed + 1, cfg.seed + 1 + cfg.retrain_seeds):
        if str(seed) not in done:
            values = {
                **best.params,
                "seed": seed,
                "run_name": f"best of {study.study_name}, seed {seed}",
            }
            tags = {**job.tags, "retrained": what}
            jobs.append(job._replace(kind="train", values=[values], tags=tags))
    for reply in carry_out(driver.executor, jobs, cfg.attempts):
        seed, result = reply["job"].values[0]["seed"], reply["result"]
        done[str(seed)] = result["run_id"]
        study.set_user_attr("retrained", {what: done})
        name = cfg.objectives[0].replace("val/", "test/")
        driver.progress.say(f"best values, seed {seed}: {name} {result[name]:.4f} ± "
                            f"{result[f'{name}_ci95']:.4f}, run {result['run_id']}")  # fmt: skip


if __name__ == "__main__":
    main("sweep", run)
