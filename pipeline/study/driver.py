"""Asks for trials, hands them to an executor, takes what comes back. Floor 5.

Imports neither torch nor Lightning. The database is the truth: a driver that is killed is replaced
by the next one, which counts what is there.
"""

import time
from collections.abc import Iterator
from typing import Any, Protocol

from optuna.storages import RDBStorage, fail_stale_trials
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pipeline.errors import UserError
from pipeline.processes import deferred_interrupts
from pipeline.study import storage as kept
from pipeline.study.live import Progress
from pipeline.study.settings import Settings
from pipeline.study.space import defaults, suggest
from pipeline.study.worker import Job, Reply
from pipeline.tracking.run import Run
from pipeline.tracking.study import close_dead

MOST_FAILURES = 3  # in a row


class Executor(Protocol):
    """Runs jobs side by side somewhere."""

    @property
    def slots(self) -> int:
        """Jobs that run at once."""

    def free(self) -> int:
        """Jobs that would start at once."""

    def submit(self, job: Job) -> None:
        """Start one."""

    def replies(self, seconds: float) -> list[Reply]:
        """What came back, at the latest after so many seconds."""

    def close(self) -> None:
        """Interrupt what runs and end the workers."""


def carry_out(executor: Executor, jobs: list[Job], attempts: int) -> Iterator[Reply]:
    """Jobs that are no trials, side by side; those whose worker dies are begun again.

    Returns:
        Their replies, each with its `job`, as they come.

    Raises:
        UserError: if one fails, or dies too often.
    """
    waiting, deaths = list(jobs), 0
    at_work: dict[str, Job] = {}
    while waiting or at_work:
        while waiting and executor.free():
            job = waiting.pop(0)
            at_work[str(job.values)] = job
            executor.submit(job)
        for reply in executor.replies(1.0):
            job = at_work.pop(str(reply["values"]))
            if reply["state"] == "lost" and (deaths := deaths + 1) < attempts:
                waiting.append(job)
            elif reply["state"] != "complete":
                raise UserError(reply.get("error") or f"a worker was {reply['state']}")
            else:
                yield {**reply, "job": job}


class Driver:
    """One sweep, from where it is until `n_trials` have ended.

    Args:
        job: the trial to be copied, without number and values.
        parent: the run of the study.
        begun: `time.monotonic()` when the workers were started.
    """

    def __init__(
        self, settings: Settings, study: Study, storage: RDBStorage, executor: Executor, job: Job,
        parent: Run, progress: Progress, begun: float,
    ) -> None:  # fmt: skip
        self.settings, self.study, self.storage = settings, study, storage
        self.executor, self.job, self.parent, self.progress = executor, job, parent, progress
        self._mine: dict[int, float] = {}  # trials that were handed out, and when they were asked
        self._failures = 0
        self._sole = job.storage.startswith("sqlite")  # see only_driver
        self._next_look = self._next_beat = 0.0
        self._busy_seconds, self._begun = 0.0, begun
        self.efficiency = float("nan")  # seconds of trials over those that the workers were there

    def run(self) -> None:
        """Until all trials have ended.

        Raises:
            UserError: if trials fail one after another.
        """
        if not self._trials() and self.settings.cfg.sampler in ("tpe", "gp"):
            own = defaults(self.settings.space, self.settings.cfg)
            if own is not None:  # no sweep ends with less than what it began with
                self.study.enqueue_trial(own)
        while True:
            self._rescue()
            trials = self._trials()
            self.progress.show(trials, self.executor.slots)
            running = sum(t.state == TrialState.RUNNING for t in trials)
            left = self.settings.cfg.n_trials - sum(t.state in kept.FINISHED for t in trials)
            if left <= 0 and not self._mine:
                self._note_efficiency()
                return
            for _ in range(min(self.executor.free(), left - running)):
                with deferred_interrupts():  # what is asked for is known as ours
                    self._hand_out()
            for reply in self.executor.replies(0.5):
                self._take(reply)

    def _note_efficiency(self) -> None:
        if not self._busy_seconds:
            return  # there was nothing to do
        seconds = self.executor.slots * (time.monotonic() - self._begun)
        self.efficiency = self._busy_seconds / seconds

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _hand_out(self) -> None:
        """Ask for a trial and start it; one that waits goes on with the run that it had."""
        trial = self.study.ask()
        self._mine[trial.number] = time.monotonic()
        self.storage.set_trial_user_attr(trial._trial_id, "process", kept.this_process())
        self.storage.record_heartbeat(trial._trial_id)
        values = suggest(trial, self.settings.space, self.settings.cfg)
        counted = [
            t.number for t in self._trials() if t.state in (*kept.FINISHED, TrialState.RUNNING)
        ]
        if counted.index(trial.number) >= self.settings.cfg.n_trials:  # another driver was first
            self.study.tell(trial.number, state=TrialState.FAIL)
            del self._mine[trial.number]
            return
        self.executor.submit(self.job._replace(trial=trial.number, values=[values]))

    def _take(self, reply: Reply) -> None:
        """Note how a trial ended.

        Raises:
            UserError: if it was one failure too many.
        """
        number, state = reply["trial"], reply["state"]
        self._busy_seconds += time.monotonic() - self._mine.pop(number, time.monotonic())
        if state in ("complete", "pruned"):
            self._failures = 0
        elif state == "interrupted":
            self.progress.say(f"trial {number} was stopped and will go on")
        elif state == "lost":
            again = kept.requeue(self.storage, self.study, number, self.settings.cfg.attempts)
            then = "it goes on" if again else "it is given up after so many attempts"
            self.progress.say(f"trial {number} lost its worker{_because(reply)}; {then}")
            self._close_dead()
        else:
            self._failures += 1
            self.progress.say(f"trial {number} failed: {reply['error']}")
            none_done = not any(t.state in kept.FINISHED for t in self._trials())
            if self._failures >= MOST_FAILURES or (reply.get("bad_input") and none_done):
                raise UserError(f"trial {number}: {reply['error']}")

    def _rescue(self) -> None:
        """Take up trials whose worker is gone, here or on another machine."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + min(5.0, self.settings.cfg.heartbeat)
        trials = self._trials()
        if time.monotonic() > self._next_beat:  # the executor says when one of ours is lost: it may
            for number in self._mine:  # wait in a queue, or the machine have slept
                self.storage.record_heartbeat(trials[number]._trial_id)
            self._next_beat = time.monotonic() + self.settings.cfg.heartbeat
        theirs = [t for t in trials if t.number not in self._mine]
        lost = kept.lost_here(theirs, self._sole)
        for number in lost:
            kept.requeue(self.storage, self.study, number, self.settings.cfg.attempts)
        fail_stale_trials(self.study)
        if len(self._trials()) > len(trials):  # some wait again
            self._close_dead()

    def _close_dead(self, others: bool = False) -> None:
        alive = [t.number for t in self._trials() if t.state == TrialState.RUNNING]
        close_dead(self.parent, alive, others)

    def stop(self) -> None:
        """End the workers, take note of what they handed back, leave no run open."""
        self.executor.close()
        for trial in self._trials():
            if trial.number in self._mine and trial.state == TrialState.RUNNING:
                kept.requeue(self.storage, self.study, trial.number)
        self._close_dead(others=self._sole)


def _because(reply: Reply) -> str:
    return f" ({reply['error']})" if reply.get("error") else ""


def default_job(settings: Settings, storage: str, tags: dict[str, Any]) -> Job:
    """A trial of this study without number and values."""
    cfg = settings.cfg
    resources = (settings.steps_per_validation, int(cfg.trainer.max_steps))
    return Job("trial", settings.overrides, [], tags, settings.name, storage, cfg.heartbeat,
               cfg.pruner, resources, list(cfg.objectives))  # fmt: skip
