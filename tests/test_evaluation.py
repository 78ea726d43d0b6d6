"""What a test leaves beside accuracies: which episodes it had, steps and times."""

import time

import pytest
import pytorch_lightning as pl

from pipeline.learners import evaluation
from pipeline.learners.evaluation import Scorer, adaptation_seconds, score_by_steps
from pipeline.learners.pixel_centroid import PixelCentroid
from pipeline.progress import Throughput
from tests.conftest import BlobSource, blob_data
from tests.test_learners import build


def identity(learner=None, data=None, episodes=7, k_shot=2, n_query=4) -> str:
    data = data or blob_data()
    scorer = Scorer(learner or PixelCentroid(), data, "test")
    return scorer.score(data.sampler("test", 3, k_shot, n_query), episodes).episode_list


def test_a_list_of_episodes_is_known_by_its_images(monkeypatch):
    here = identity()
    assert len(here) == 64
    assert identity(build("maml")) == identity(build("protonet")) == here
    monkeypatch.setattr(evaluation, "CHUNK", 3)  # of maml
    monkeypatch.setattr(evaluation, "GATHERED", 1)  # of the others: one at a time
    assert identity() == identity(build("maml")) == here
    others = [
        identity(episodes=6),
        identity(k_shot=1),
        identity(n_query=3),
        identity(data=blob_data(eval_seed=1)),
        identity(data=blob_data(BlobSource(images=21))),
    ]
    assert len({here, *others}) == 6
    assert identity(data=blob_data(seed=5, mean=[0.0])) == here  # of training, of preparation


def test_accuracy_after_each_step():
    learner, data = build("maml", "learner.inner_lr=0.5"), blob_data()
    sampler = data.sampler("test", 3, 2, 4)
    found = score_by_steps(learner, data, sampler, 7)
    assert list(found) == [0, 1, 2, 3, 5]
    assert learner.eval_inner_steps == 5
    assert found[5] == Scorer(learner, data, "test").score(sampler, 7).interval().mean
    assert found[5] > found[0]
    learner.eval_inner_steps = 2
    assert score_by_steps(learner, data, sampler, 7) == {k: found[k] for k in (0, 1, 2)}


class Waiting(PixelCentroid):
    """Takes long for the first tasks and for one other."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def adapt(self, support_x, support_y):
        self.seen.append(tuple(support_x.shape))
        assert support_y.tolist() == [0, 0, 1, 1, 2, 2]
        assert not self.training
        slow = len(self.seen) <= evaluation.WARM_UP or len(self.seen) == 6
        time.sleep(0.1 if slow else 0.005)
        return super().adapt(support_x, support_y)


def test_the_time_to_adapt_is_a_median_without_the_first_tasks():
    learner = Waiting()
    learner.train()
    seconds = adaptation_seconds(learner, blob_data(), "val", 3, 2, 4, tasks=5)
    assert 0.005 <= seconds < 0.1
    assert learner.seen == [(6, 1, 10, 10)] * (evaluation.WARM_UP + 5)
    assert learner.training


class SlowValidation(pl.Callback):
    def on_validation_start(self, trainer, pl_module):
        time.sleep(0.2)


def test_the_time_of_training_is_without_validation_and_goes_on_when_resumed(tmp_path):
    throughput = Throughput()
    throughput.load_state_dict({"seconds": 100.0})
    trainer = pl.Trainer(
        max_steps=8, accelerator="cpu", logger=False, default_root_dir=tmp_path,
        callbacks=[SlowValidation(), throughput], enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, enable_checkpointing=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(build("protonet"), blob_data())  # two epochs of four steps
    spent = time.perf_counter() - start
    seconds = throughput.state_dict()["seconds"]
    assert 100 < seconds < 100 + spent - 0.4
    assert float(trainer.callback_metrics["train/seconds"]) == pytest.approx(seconds, abs=1e-3)
