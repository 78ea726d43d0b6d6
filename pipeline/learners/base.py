"""MetaLearner: what every learner shares. Floor 3."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MeanMetric

from pipeline.blocks import is_transductive
from pipeline.episode import Classifier, Episode
from pipeline.functional import Loss, query_loss, score
from pipeline.metrics import EpisodeMean

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
TrainsOn = Literal["episodes", "images"]


class MetaLearner(pl.LightningModule, ABC):
    """Maps a support set to a classifier; everything else follows from `adapt`.

    Args:
        optimizer: of the outer loop, from parameters (any of torch.optim, partially applied);
            None if there is nothing to train.
        scheduler: of its rate, stepped once a training step (ReduceLROnPlateau: once a validation,
            by val/loss, of which a resumed run misses the one it was stopped after); None keeps
            the rate.
        loss: of each query, see `functional.query_loss`.

    Attributes:
        n_way: classes of every task that this learner takes; None for any number.
        regresses: whether it takes real targets too.
        trains_on: what `meta_loss` is of, a batch of `episodes` or one of `images`.
    """

    regresses: ClassVar[bool] = False
    n_way: int | None = None
    trains_on: ClassVar[TrainsOn] = "episodes"

    def __init__(
        self,
        optimizer: OptimizerFactory | None,
        scheduler: SchedulerFactory | None,
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__()
        self.loss_name = loss
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self._seed = torch.initial_seed() % 2**31
        self.val_score, self.test_score = EpisodeMean(), EpisodeMean()
        # Lightning's own mean is wrong where processes have different numbers of episodes
        self.val_loss, self.test_loss = (MeanMetric(nan_strategy="disable") for _ in range(2))

    @abstractmethod
    def adapt(self, support_x: Tensor, support_y: Tensor) -> Classifier:
        """Turn one support set into a classifier; leaves the learner as it was.

        Args:
            support_x: (m, C, H, W) float, one task, no tasks axis.
            support_y: (m,) int64, classes 0..n_way-1, any order, any number of images a class; if
                it `regresses` also real targets (m, 1).

        Returns:
            Classifier from query_x (m, C, H, W) to logits (m, n_way).

        Raises:
            ValueError: if a class of 0..n_way-1 has no support image.
        """

    @property
    def label(self) -> str:
        """The name that tables show."""
        return type(self).__name__

    @property
    def protocol(self) -> str:
        """Transductive if a prediction depends on the other queries, else inductive."""
        return "transductive" if is_transductive(self) else "inductive"

    def predict(self, batch: Episode) -> Tensor:
        """`adapt` to each task of a meta-batch and classify its queries.

        Returns:
            (tasks, n_way*n_query, n_way) logits.
        """
        return torch.stack([self.adapt(t.support_x, t.support_y)(t.query_x) for t in batch.tasks()])

    def check_ways(self, n_way: int) -> None:
        """Refuse a task of another number of classes than this learner was built for.

        Raises:
            ValueError: naming both numbers.
        """
        if self.n_way not in (None, n_way):
            raise ValueError(
                f"n_way: {n_way} classes, but this {self.label} was trained for {self.n_way}; an "
                "embedding learner (protonet) takes any number"
            )

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Loss of each query: (..., m, n_way), (..., m) -> (..., m)."""
        return query_loss(self.loss_name, logits, y)

    def meta_loss(self, batch: Episode) -> tuple[Tensor, Tensor, Tensor]:
        """What the outer optimiser descends, over a meta-batch.

        Returns:
            The tensor to differentiate, the mean query loss to report, and the mean score.
        """
        logits = self.predict(batch)
        loss = self.loss(logits, batch.query_y).mean()
        return loss, loss.detach(), score(logits, batch.query_y).mean()

    def compile_networks(self) -> None:
        """Have torch.compile speed up what it can, from the next step on."""

    def on_train_batch_start(self, batch: Episode, batch_idx: int) -> None:
        """Seed dropout and the like by the batch, so that a resumed run draws the same masks."""
        accumulated = self.trainer.accumulate_grad_batches
        batch_number = self.global_step * accumulated + batch_idx % accumulated
        torch.manual_seed(hash((self._seed, self.global_rank, batch_number)))  # of ints: fixed

    def training_step(self, batch: Episode, batch_idx: int) -> Tensor:
        """One step over a meta-batch; logs train/loss and, of classes, train/acc."""
        objective, loss, value = self.meta_loss(batch)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        if batch.measure == "acc":
            self.log("train/acc", value, prog_bar=True, sync_dist=True)
        return objective

    def _evaluate(self, batch: Episode, split: str, metric: EpisodeMean, loss: MeanMetric) -> None:
        logits = self.predict(batch)
        metric.update(score(logits, batch.query_y), batch.measure)
        loss.update(self.loss(logits, batch.query_y).mean(1))
        self.log(f"{split}/loss", loss, batch_size=len(batch.query_y))

    def validation_step(self, batch: Episode, batch_idx: int) -> None:
        """Score the validation episodes of a batch."""
        self._evaluate(batch, "val", self.val_score, self.val_loss)

    def test_step(self, batch: Episode, batch_idx: int) -> None:
        """Score the test episodes of a batch."""
        self._evaluate(batch, "test", self.test_score, self.test_loss)

    def _log_epoch(self, split: str, metric: EpisodeMean) -> None:
        for name, value in metric.compute().items():
            self.log(f"{split}/{name}", value, prog_bar=name == metric.measure)
        metric.reset()

    def on_validation_epoch_end(self) -> None:
        """Log val/acc and val/acc_ci95, of real targets val/mse and val/mse_ci95."""
        self._log_epoch("val", self.val_score)

    def on_test_epoch_end(self) -> None:
        """The same of the test episodes."""
        self._log_epoch("test", self.test_score)

    def configure_optimizers(self) -> Any:
        """The outer optimiser and, if asked for, its schedule."""
        if self.make_optimizer is None:
            return None
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler: dict[str, Any] = {"scheduler": self.make_scheduler(optimizer)}
        if isinstance(scheduler["scheduler"], ReduceLROnPlateau):
            scheduler |= {"interval": "epoch", "monitor": "val/loss"}
        else:
            scheduler |= {"interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}
