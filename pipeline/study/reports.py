"""What a trial tells its study while it trains. Floor 5."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from optuna.pruners import BasePruner
from optuna.storages import RDBStorage
from optuna.study import Study
from pytorch_lightning.callbacks import Callback

BLOCK = 10  # validation episodes that WilcoxonPruner takes as one observation


class Reports(Callback):
    """Reports a score after each validation, and stops the training if the pruner says so.

    The training ends as one that is done: raising from within would mark its run FAILED.

    Attributes:
        pruned: whether it was stopped.
        adapt_seconds: to adapt to one validation task, measured at the end if it is an objective.
    """

    def __init__(
        self,
        study: Study,
        storage: RDBStorage,
        trial: int,
        pruner: BasePruner,
        in_blocks: bool,
        objectives: Sequence[str],
    ) -> None:
        self._study, self._storage, self._trial = study, storage, trial
        self._pruner, self._in_blocks, self._objectives = pruner, in_blocks, objectives
        self.pruned, self.adapt_seconds = False, float("nan")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The study knows the run, so that a trial that dies can go on with it."""
        run: Any = trainer.logger.run  # type: ignore[union-attr]  # a RunLogger
        self._storage.set_trial_user_attr(self._trial, "run_id", run.run_id)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Scores of blocks of episodes, before the learner sums them up."""
        if self._in_blocks:
            values = torch.cat(pl_module.val_score.values).tolist()
            for i in range(0, len(values), BLOCK):
                block = values[i : i + BLOCK]
                self._report((trainer.global_step * len(values) + i) // BLOCK, block)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report, ask, and stop."""
        if not self._in_blocks:
            found = float(trainer.callback_metrics[self._objectives[0]])
            self._report(trainer.global_step, [found])
        if len(self._objectives) > 1 or trainer.global_step >= trainer.max_steps:
            return
        if self._pruner.prune(self._study, self._storage.get_trial(self._trial)):
            self.pruned = trainer.should_stop = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measure what is asked for; mark the run as what it is."""
        state = "PRUNED" if self.pruned else "COMPLETE"
        run: Any = trainer.logger.run  # type: ignore[union-attr]  # a RunLogger
        if "adapt_seconds" in self._objectives:
            from pipeline.learners.evaluation import adaptation_seconds

            data: Any = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it
            shape = (data.n_way, data.k_shot, data.n_query)
            self.adapt_seconds = adaptation_seconds(pl_module, data, "val", *shape)
            run.log_metrics({"val/adapt_seconds": self.adapt_seconds}, trainer.global_step)
        run.set_tags({"optuna.state": state})

    def _report(self, step: int, values: Sequence[float]) -> None:
        mean = sum(values) / len(values)
        self._storage.set_trial_intermediate_value(self._trial, step, mean)
