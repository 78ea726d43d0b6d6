"""`python -m pipeline.study.worker`: carries out jobs, one after another, in one process. Floor 5.

Started by an executor. Torch is imported once and stays, so that a trial costs no start-up.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.compose import compose_config
from pipeline.errors import UserError

if TYPE_CHECKING:
    from optuna.study import Study

Reply = dict[str, Any]


class Job(NamedTuple):
    """What a worker is asked to do; plain values, so that it travels as JSON.

    Attributes:
        kind: "check" (is `overrides` with each of `values` a valid training?), "trial" (number
            `trial` of the study), or "train" (train and test with `values[0]`).
        overrides: of `conf/train.yaml`.
        values: {KEY: VALUE} on top of them.
        tags: of the MLflow run.
    """

    kind: str
    overrides: list[str]
    values: list[dict[str, Any]]
    tags: dict[str, str]
    study: str
    storage: str
    heartbeat: int
    pruner: str
    resources: tuple[int, int]  # outer steps to the first and to the last validation
    objectives: list[str]
    trial: int | None = None

    def lost(self, error: str = "") -> Reply:
        """The reply in place of a worker that died."""
        return {"trial": self.trial, "values": self.values, "state": "lost", "error": error}


def as_override(key: str, value: object) -> str:
    """KEY=VALUE as Hydra reads it."""
    return f"{key}={json.dumps(value)}"


def carry_out(job: Job) -> Reply:
    """Do it; whatever goes wrong is an answer too.

    Returns:
        `trial` and `values` of the job, and `state`: "complete", "pruned", "interrupted" or
        "failed", with `error`, and `bad_input` where a UserError says it.
    """
    reply: Reply = {"trial": job.trial, "values": job.values}
    work = {"check": _check, "trial": _trial, "train": _train}[job.kind]
    try:
        return {**reply, "state": "complete", **work(job)}
    except KeyboardInterrupt:
        return {**reply, "state": "interrupted"}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return {**reply, "state": "failed", "bad_input": True, "error": str(error)}
    except Exception as error:  # a trial that fails must not take the sweep down
        traceback.print_exc()
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {**reply, "state": "failed", "error": f"{type(error).__name__}: {text}"}
    finally:
        _tidy()


def _check(job: Job) -> Reply:
    """Every configuration of the space is valid, and the data can be loaded."""
    from pipeline import config
    from pipeline.trainer import build_trainer_options

    problems: list[str] = []
    for values in job.values:  # the first are none: if these are wrong, so are all others
        try:
            cfg = compose_config("train", _overrides(job, values))
            config.check(cfg)
            build_trainer_options(cfg)
        except UserError as error:
            if not values:
                raise
            origin = "".join(f" (space.{key})" for key in values)
            problems += [line + origin for line in str(error).splitlines()]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    config.build_data(compose_config("train", job.overrides).data).setup("fit")
    return {}


def _overrides(job: Job, values: Mapping[str, Any]) -> list[str]:
    return [*job.overrides, *(as_override(k, v) for k, v in values.items())]


def _train(job: Job) -> Reply:
    from pipeline import train

    overrides = _overrides(job, job.values[0])
    return {"result": train.run(compose_config("train", overrides), overrides, tags=job.tags)}


def _trial(job: Job) -> Reply:
    """Train with a trial's values, from its last checkpoint if it has one, and tell the study."""
    import optuna

    from pipeline.study import storage as kept
    from pipeline.study.reports import Reports
    from pipeline.study.search import make_pruner

    assert job.trial is not None
    pruner = make_pruner(job.pruner, *job.resources)
    sampler = optuna.samplers.RandomSampler()  # values are given: nothing is sampled here
    with kept.closing(kept.open_storage(job.storage, job.heartbeat, 1)) as storage:
        study = optuna.load_study(
            study_name=job.study, storage=storage, sampler=sampler, pruner=pruner
        )
        trial = kept.trial_id(storage, job.study, job.trial)
        storage.set_trial_user_attr(trial, "process", kept.this_process())
        run_id = storage.get_trial(trial).user_attrs.get("run_id")
        reports = Reports(study, storage, trial, pruner, job.pruner == "wilcoxon", job.objectives)
        try:
            with kept.heartbeats(storage, trial):
                return _run_trial(job, run_id if _can_go_on(run_id) else None, reports, study)
        except KeyboardInterrupt:
            kept.requeue(storage, study, job.trial)
            raise
        except Exception as error:  # is told on, by carry_out
            storage.set_trial_user_attr(trial, "error", str(error)[:500])
            study.tell(job.trial, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
            raise


def _can_go_on(run_id: str | None) -> bool:
    """Whether a run got as far as its first checkpoint."""
    from pipeline.tracking.store import find_checkpoint

    if run_id:
        with suppress(UserError):
            return find_checkpoint(run_id, "last").exists()
    return False


def _run_trial(job: Job, run_id: str | None, reports: Any, study: "Study") -> Reply:
    from optuna.trial import TrialState

    from pipeline import train

    assert job.trial is not None
    tags = {**job.tags, "trial": job.trial}
    if run_id:
        overrides = [f"resume={run_id}"]
        print(f"trial {job.trial} goes on with run {run_id}", flush=True)
    else:
        own = {"test": False, "run_name": f"trial {job.trial:03d}"}
        overrides = _overrides(job, {**job.values[0], **own})
    result = train.run(compose_config("train", overrides), overrides, [reports], tags)
    if reports.pruned:
        study.tell(job.trial, state=TrialState.PRUNED, skip_if_finished=True)
        return {"state": "pruned"}
    found = [reports.adapt_seconds if o == "adapt_seconds" else result[o] for o in job.objectives]
    study.tell(job.trial, found, skip_if_finished=True)
    return {}


def _tidy() -> None:
    """The memory of one training is the next one's."""
    import gc

    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()


def main() -> None:
    """Jobs come as lines of JSON on standard input, replies go to standard output.

    What a training prints goes to standard error, the worker's log. When the input ends, the
    driver is gone or wants no more: a trial at work is interrupted and waits for another worker.
    """
    from pipeline.tracking.run import sigterm_interrupts

    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            jobs.put(Job(**json.loads(line)))
        jobs.put(None)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()
    try:
        with sigterm_interrupts():
            import pipeline.config
            import pipeline.reporting  # noqa: F401  what every training imports

            print(json.dumps({"ready": os.getpid()}), file=replies)
            while job := jobs.get():
                reply = carry_out(job)
                print(json.dumps(reply), file=replies)
                if reply["state"] == "interrupted":
                    break
    except (KeyboardInterrupt, BrokenPipeError):
        pass


if __name__ == "__main__":
    main()
