"""The contract of every learner in conf/learner, met through its YAML alone."""

import copy
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from pipeline import config
from pipeline.compose import compose_config
from pipeline.data.datamodule import EpisodicDataModule
from pipeline.episode import Batch, Episode
from pipeline.learners.base import MetaLearner
from pipeline.learners.embedding import EmbeddingLearner
from pipeline.learners.evaluation import Scorer
from pipeline.learners.gradient import GradientLearner
from tests.conftest import blob_data

CONF = {p.stem: p for p in sorted(Path(__file__).parents[1].glob("conf/learner/*.yaml"))}
SHAPE = (1, 10, 10)


def build(name: str, *overrides: str) -> MetaLearner:
    small = [
        "backbone=conv4",
        "backbone.width=8",
        "backbone.downsample=stride",
        "data.n_way=3",
        "trainer.max_steps=50",
    ]
    cfg = compose_config("train", [f"learner={name}", *small, *overrides])
    config.check(cfg)
    if "n_train_classes" in cfg.learner:
        cfg.learner.n_train_classes = 9  # of `blob_data`, as a training fills it in
    torch.manual_seed(0)
    return config.build_learner(cfg, SHAPE)


def make_task(k_shot: int = 2, seed: int = 0) -> Episode:
    """A 3-way task with 4 queries a class, prepared as the data module does."""
    data = blob_data(train_k_shot=k_shot, seed=seed)
    data.setup("fit")
    return data.on_after_batch_transfer(data._dataset("train")[[0]], 0).tasks()[0]


def data_for(learner: MetaLearner, k_shot: int = 2) -> EpisodicDataModule:
    images = 18 if learner.trains_on == "images" else None
    return blob_data(images_per_batch=images, train_k_shot=k_shot)


def make_batch(learner: MetaLearner, episodes: int, k_shot: int = 2) -> Batch:
    """So many episodes, or 18 images for a learner that trains on those."""
    data = data_for(learner, k_shot)
    indices = list(range(data.images_per_batch or episodes))
    return data.on_after_batch_transfer(data._dataset("train")[indices], 0)


def trainable(learner: MetaLearner) -> bool:
    return any(p.requires_grad for p in learner.parameters())


@pytest.fixture(params=CONF)
def learner(request: pytest.FixtureRequest) -> MetaLearner:
    return build(request.param)


def test_adapt_gives_logits_in_every_mode(learner):
    task = make_task()
    learner.eval()
    plain = learner.adapt(task.support_x, task.support_y)(task.query_x)
    assert plain.shape == (12, 3)
    with torch.no_grad():
        without = learner.adapt(task.support_x, task.support_y)(task.query_x)
    with torch.inference_mode():
        inference = learner.adapt(task.support_x, task.support_y)(task.query_x)
    torch.testing.assert_close(plain.detach(), without)
    torch.testing.assert_close(without, inference)


def test_evaluation_leaves_the_learner_as_it_was(learner):
    task = make_task()
    learner.eval()
    before = copy.deepcopy(learner.state_dict())
    learner.adapt(task.support_x, task.support_y)(task.query_x)
    for name, value in learner.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_order_of_the_support_set_does_not_matter(learner):
    task = make_task()
    learner.eval()
    order = torch.tensor([3, 5, 0, 4, 1, 2])
    with torch.no_grad():
        a = learner.adapt(task.support_x, task.support_y)(task.query_x)
        b = learner.adapt(task.support_x[order], task.support_y[order])(task.query_x)
    torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_unequal_shots_are_fine_and_a_missing_class_is_named(learner):
    task = make_task()
    learner.eval()
    some = torch.tensor([0, 2, 3, 4])
    logits = learner.adapt(task.support_x[some], task.support_y[some])(task.query_x)
    assert logits.shape == (12, 3)
    with pytest.raises(ValueError, match="no image of class 1"):
        learner.adapt(task.support_x[[0, 4]], task.support_y[[0, 4]])


def test_every_parameter_gets_a_gradient(learner):
    if not trainable(learner):
        pytest.skip("untrained by design")
    learner.train()
    batch = make_batch(learner, episodes=2, k_shot=5)  # as far as SNAIL's convolutions reach
    learner.meta_loss(batch)[0].backward()
    for name, parameter in learner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_training_on_one_episode_lowers_its_loss(learner):
    if not trainable(learner):
        pytest.skip("untrained by design")
    batch = make_batch(learner, episodes=1)
    optimizer = learner.make_optimizer(learner.parameters())
    learner.train()
    torch.manual_seed(0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        objective, loss, _ = learner.meta_loss(batch)
        objective.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]


def fit(learner: MetaLearner, folder: Path) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=4, accelerator="cpu", logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(learner, data_for(learner))
    return trainer


def test_same_seed_same_result_and_a_checkpoint_round_trip(learner, tmp_path, request):
    if not trainable(learner):
        pytest.skip("untrained by design")
    trainer = fit(learner, tmp_path)
    twin = build(request.node.callspec.params["learner"])
    fit(twin, tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    other = build(request.node.callspec.params["learner"])
    other.load_state_dict(stored)
    for name, value in learner.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
        assert torch.equal(value, other.state_dict()[name]), name


def test_lightning_and_the_scorer_agree(learner, tmp_path):
    """Lightning's loop runs in inference mode, the scorer may embed images once: same numbers."""
    data = data_for(learner)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
                         default_root_dir=tmp_path)  # fmt: skip
    (result,) = trainer.test(learner, data, verbose=False)
    scores = Scorer(learner, data, "test").score(data.sampler("test", 3, 2, 4), 7)
    assert scores.correct.shape == (7, 12)
    assert result["test/acc"] == pytest.approx(scores.interval().mean, abs=1e-6)
    assert result["test/acc_ci95"] == pytest.approx(scores.interval().ci95, abs=1e-6)
    by_class = scores.by_class()
    assert set(by_class) <= set(data.classes("test"))


def test_embedding_once_equals_adapting_episode_by_episode(learner):
    if not (isinstance(learner, EmbeddingLearner) and learner.embeds_once):
        pytest.skip("embeds nothing once")
    data, sampler = blob_data(), blob_data().sampler("test", 3, 2, 4)
    scorer = Scorer(learner, data, "test")
    once = scorer.score(sampler, 7)
    assert scorer._embedded is not None
    learner.eval()
    dataset = data._dataset("test")
    with torch.no_grad():
        for index in range(7):
            task = data.on_after_batch_transfer(dataset[[index]], 0).tasks()[0]
            logits = learner.adapt(task.support_x, task.support_y)(task.query_x)
            right = (logits.argmax(1) == task.query_y).numpy()
            assert (right == once.correct[index]).all()


@torch.no_grad()
def test_the_inner_curve_begins_at_theta_and_passes_through_what_adapt_returns(learner):
    if not isinstance(learner, GradientLearner):
        pytest.skip("no inner loop")
    learner.eval()
    tasks = [make_task(seed=seed) for seed in (0, 1)]
    fields = zip(*(task[:-1] for task in tasks), strict=True)
    steps = learner.eval_inner_steps
    curve = learner.inner_curve(Episode(*map(torch.stack, fields), 3), steps + 1)
    assert len(curve.support_loss) == len(curve.query_accuracy) == steps + 2
    start = [F.cross_entropy(learner.net(t.support_x), t.support_y) for t in tasks]
    assert curve.support_loss[0] == pytest.approx(float(sum(start)) / 2, rel=1e-5)
    assert curve.support_loss[-1] < curve.support_loss[0]
    adapted = [(learner.adapt(t.support_x, t.support_y), t) for t in tasks]
    right = [(c(t.query_x).argmax(1) == t.query_y).float().mean() for c, t in adapted]
    assert curve.query_accuracy[steps] == pytest.approx(float(sum(right)) / 2)


def test_the_header_says_the_protocol(learner, request):
    text = CONF[request.node.callspec.params["learner"]].read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert learner.protocol.capitalize() in " ".join(header)


def test_the_protocol_is_that_of_the_norm(learner, request):
    if not trainable(learner):
        assert learner.protocol == "inductive"
        return
    name = request.node.callspec.params["learner"]
    assert build(name, "backbone.norm=batch_stats").protocol == "transductive"
    assert build(name, "backbone.norm=group").protocol == "inductive"
