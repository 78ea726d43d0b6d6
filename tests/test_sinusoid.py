"""Regression as a meta-task: functions, their errors, and all commands on them."""

import math
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from optuna.study import StudyDirection
from scipy import stats

from pipeline import config, evaluate, report, train
from pipeline.compose import CONF, compose_config
from pipeline.data.functions import FunctionEpisodes
from pipeline.data.sinusoid import Sinusoid
from pipeline.errors import UserError
from pipeline.functional import score
from pipeline.learners.base import MetaLearner
from pipeline.learners.evaluation import make_scorer
from pipeline.learners.gradient import GradientLearner
from pipeline.learners.nearest_point import NearestPoint
from pipeline.metrics import EpisodeMean
from pipeline.tracking import store
from tests.conftest import stored_table

RECIPE = "experiment=maml_sinusoid"
SMALL = [
    RECIPE,
    "backbone.widths=[8,8]",
    "data.meta_batch_size=4",
    "data.batches_per_epoch=10",
    "data.val_episodes=20",
    "data.test_episodes=12",
    "trainer.max_steps=20",
    "trainer.accelerator=cpu",
    "learner.eval_inner_steps=5",
]
REGRESSING = [
    path.stem
    for path in sorted((CONF / "learner").glob("*.yaml"))
    if hydra.utils.get_class(
        compose_config("train", [f"learner={path.stem}"]).learner._target_
    ).regresses
]


def family() -> Sinusoid:
    return Sinusoid(amplitude=(0.1, 5.0), phase=(0.0, math.pi), x_range=(-5.0, 5.0))


def episodes(
    k_shot: int = 10, n_query: int = 20, seed: int = 0, split: str = "test"
) -> FunctionEpisodes:
    return FunctionEpisodes(family(), k_shot, n_query, seed, split)


def solve(stream: FunctionEpisodes, tasks: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Amplitudes and phases from the points alone: y is linear in sin x and cos x."""
    batch = stream[range(tasks)]
    x = torch.cat([batch.support_x, batch.query_x], 1).flatten(1).double()
    y = torch.cat([batch.support_y, batch.query_y], 1).flatten(1).double()
    design = torch.stack([x.sin(), x.cos()], 2)
    found = torch.linalg.lstsq(design, y.unsqueeze(2)).solution  # A cos(phase), -A sin(phase)
    worst = (design @ found - y.unsqueeze(2)).abs().max().item()
    a, b = found[:, 0, 0].numpy(), -found[:, 1, 0].numpy()
    return np.hypot(a, b), np.arctan2(b, a), worst


# --- the functions


def test_targets_lie_on_sinusoids_drawn_as_the_paper_has_it():
    amplitude, phase, worst = solve(episodes(), 2000)
    assert worst < 1e-5  # of float32
    assert stats.kstest(amplitude, stats.uniform(0.1, 4.9).cdf).pvalue > 0.01
    assert stats.kstest(phase, stats.uniform(0, math.pi).cdf).pvalue > 0.01
    assert abs(stats.spearmanr(amplitude, phase).statistic) < 0.06
    for x in (episodes()[range(500)].support_x, episodes()[range(500)].query_x):
        assert stats.kstest(x.flatten().numpy(), stats.uniform(-5, 10).cdf).pvalue > 0.01


def test_an_episode_is_a_function_of_seed_split_and_index():
    stacked, again = episodes()[[7, 3, 1_750_000]], episodes()[[3]]
    assert torch.equal(stacked.query_x[1], again.query_x[0])
    assert torch.equal(stacked.support_y[1], again.support_y[0])
    alone = episodes()[1_750_000]
    assert torch.equal(stacked.query_y[2], alone.query_y)
    assert alone.support_x.shape == (10, 1, 1, 1)
    assert alone.support_y.shape == (10, 1)
    assert alone.support_x.dtype == alone.query_y.dtype == torch.float32
    assert alone.measure == "mse"
    function = episodes().functions([7, 3, 1_750_000])
    x = stacked.query_x.flatten(1).double().numpy()
    np.testing.assert_allclose(function(x), stacked.query_y.flatten(1), atol=1e-6)


def test_five_shots_are_the_first_of_ten_and_the_queries_the_same():
    five, ten = episodes(5)[[4]], episodes(10)[[4]]
    assert torch.equal(five.support_x, ten.support_x[:, :5])
    assert torch.equal(five.query_y, ten.query_y)


def test_streams_share_no_function():
    streams = [("train", 0), ("val", 0), ("test", 0), ("train", 1), ("test", 1)]
    drawn = [
        episodes(split=split, seed=seed)[range(2000)].query_y[:, 0, 0] for split, seed in streams
    ]
    assert len(set(torch.cat(drawn).tolist())) > 9990  # float32 may coincide now and then
    data = config.build_data(compose_config("train", [*SMALL, "seed=3"]).data)
    assert torch.equal(data._dataset("train")[0].query_y, episodes(10, 10, 3, "train")[0].query_y)
    assert torch.equal(data._dataset("val")[0].query_y, episodes(10, 100, 0, "val")[0].query_y)


# --- the errors


def test_mean_squared_error_by_hand():
    predicted = torch.tensor([[[1.0], [2.0]], [[0.0], [0.5]]])
    target = torch.tensor([[[1.5], [4.0]], [[0.0], [0.0]]])
    assert score(predicted, target).tolist() == [(0.25 + 4) / 2, 0.125]
    metric = EpisodeMean()
    metric.update(score(predicted, target), "mse")
    mean, half = metric.compute().values()
    assert list(metric.compute()) == ["mse", "mse_ci95"]
    assert mean == pytest.approx((2.125 + 0.125) / 2)
    assert half == pytest.approx(1.96 * (2 / math.sqrt(2)) / math.sqrt(2))  # deviation 2 / sqrt(2)


def test_the_floor_is_the_value_at_the_nearest_point():
    x = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1)
    y = torch.tensor([[5.0], [-1.0], [2.0]])
    predicted = NearestPoint().adapt(x, y)(torch.tensor([0.4, 0.6, 2.5, -9.0]).view(4, 1, 1, 1))
    assert predicted.flatten().tolist() == [5, -1, 2, 5]


def build(name: str = "maml", *overrides: str) -> MetaLearner:
    cfg = compose_config("train", [f"learner={name}", "data=sinusoid", *overrides])
    cfg.learner.loss = "mse"
    cfg.backbone = {"_target_": "pipeline.backbones.MLP", "widths": [6, 6], "norm": "none"}
    config.check(cfg)
    torch.manual_seed(0)
    return config.build_learner(cfg, (1, 1, 1))


@pytest.mark.parametrize("name", REGRESSING)
def test_learners_with_an_inner_loop_take_real_targets(name):
    """One by one or stacked the same; what is reported is no part of a graph."""
    learner, batch = build(name), episodes()[range(4)]
    learner.train()
    objective, loss, mse = learner.meta_loss(batch)
    objective.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters())
    assert not mse.requires_grad
    assert loss.item() == pytest.approx(mse.item(), rel=1e-5)
    learner.eval()
    one_by_one = learner.predict(batch)
    assert one_by_one.shape == (4, 20, 1)
    learner.engine = "vmap"
    torch.testing.assert_close(learner.predict(batch), one_by_one, atol=1e-5, rtol=1e-5)


def test_one_inner_step_by_hand_and_as_the_scorer_has_it():
    """MAML with a linear network, w x + b: a step on the mean of the squares."""
    learner = build("maml", "learner.inner_lr=0.01", "learner.eval_inner_steps=1")
    learner.net.body, learner.net.head = torch.nn.Flatten(), torch.nn.Linear(1, 1)
    with torch.no_grad():
        learner.net.head.weight.fill_(0.5)
        learner.net.head.bias.fill_(-1.0)
    errors = []
    for task in episodes()[range(3)].tasks():
        x, y = task.support_x.flatten(), task.support_y.flatten()
        residual = 0.5 * x - 1 - y
        w = 0.5 - 0.01 * (2 * residual * x).mean()
        b = -1 - 0.01 * (2 * residual).mean()
        errors.append((w * task.query_x.flatten() + b - task.query_y.flatten()).square().mean())
    data = config.build_data(compose_config("train", SMALL).data)
    found = make_scorer(learner, data, "test").score(episodes(), 3)
    np.testing.assert_allclose(found.by_episode(), torch.stack(errors).detach(), rtol=1e-5)
    assert found.interval().mean == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_the_meta_gradient_is_that_of_finite_differences(engine):
    learner = build(
        "maml", "learner.inner_lr=0.01", "learner.inner_steps=2", f"learner.engine={engine}"
    ).double()
    for parameter in learner.parameters():  # away from the kinks of ReLU
        torch.nn.init.normal_(parameter, std=0.5)
    batch = episodes(5, 5)[range(3)].each(lambda f: f.double() if f.is_floating_point() else f)
    learner.meta_loss(batch)[0].backward()
    for parameter in learner.parameters():
        direction = torch.randn_like(parameter)
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(step * direction)
            ends.append(learner.meta_loss(batch)[1].item())
            with torch.no_grad():
                parameter.sub_(step * direction)
        slope = (ends[0] - ends[1]) / 2e-6
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


# --- the commands


def run_train(*overrides: str, callbacks=()) -> dict:
    overrides = (*SMALL, *overrides)
    return train.run(compose_config("train", overrides), overrides, callbacks)


def weights(run_id: str, which: str) -> dict:
    return torch.load(store.find_checkpoint(run_id, which), weights_only=True)


@pytest.mark.usefixtures("runs_folder")
def test_train_and_evaluate(capsys):
    result = run_train("trainer.max_steps=40")
    client = store.connect()
    run = client.get_run(result["run_id"])
    curve = client.get_metric_history(result["run_id"], "val/mse")
    best = min(curve, key=lambda point: point.value)
    assert len(curve) == 4
    assert weights(result["run_id"], "best")["global_step"] == best.step
    assert run.data.metrics["val/best_mse"] == pytest.approx(best.value)
    assert run.data.tags["measure"] == "mse"
    assert "train/acc" not in run.data.metrics
    assert "image_shape" not in str(run.data.params)
    assert (
        result["test/mse"]
        == result["test/sinusoid_10s/mse"]
        == result["test/sinusoid_10s/mse_after_5"]
    )
    assert result["test/mse_ci95"] > 0
    steps = {
        p.step: p.value for p in client.get_metric_history(result["run_id"], "adapt/mse_at_step")
    }
    assert steps.keys() == {0, 1, 2, 3, 5}
    assert steps[5] == pytest.approx(result["test/mse"])
    table = stored_table(client, result["run_id"])
    assert list(table["learner"]) == ["MAML", "MAML", "NearestPoint"] * 2
    assert list(table["inner_steps"][:2]) == [1, 5]
    assert list(table["published"][:2]) == [0.67, 0.38]  # at five shots, by the number of steps
    assert table["published"][2:].isna().all()
    figures = {f.path for f in client.list_artifacts(result["run_id"], "figures")}
    assert figures == {"figures/sinusoid_5s.png", "figures/sinusoid_10s.png"}
    (kept,) = (
        e.path for e in client.list_artifacts(result["run_id"], "episodes") if "_5s_" in e.path
    )
    by_episode = pd.read_csv(client.download_artifacts(result["run_id"], kept))
    assert by_episode["MAML, 1 step"].mean() == pytest.approx(
        result["test/sinusoid_5s/mse_after_1"]
    )
    out = capsys.readouterr().out
    assert "MAML, 5 steps" in out
    assert "val/mse" in out

    overrides = [f"run={result['run_id']}"]
    again = evaluate.run(compose_config("evaluate", overrides), overrides)
    assert again["test/sinusoid_5s/mse"] == result["test/sinusoid_5s/mse"]
    overrides += ["+data=sinusoid", "data.amplitude=[5.0,10.0]", "k_shot=20", "episodes=8"]
    wider = evaluate.run(compose_config("evaluate", overrides), overrides)
    assert wider["test/sinusoid_20s/mse"] > 2 * result["test/mse"]
    with pytest.raises(
        UserError, match="data: Glyphs has classes, but Sinusoid, which this learner"
    ):
        evaluate.run(compose_config("evaluate", [f"run={result['run_id']}", "+data=glyphs"]))
    with pytest.raises(UserError, match=r"is of real targets \(mse\); a report ranks accuracies"):
        report.run(compose_config("report", []))


class Stop(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.global_step == 20:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("runs_folder")
def test_a_stopped_run_resumes_to_the_same_weights():
    whole = run_train("trainer.max_steps=40")
    with pytest.raises(KeyboardInterrupt):
        run_train("trainer.max_steps=40", callbacks=[Stop()])
    (found,) = (store.MLRUNS / "checkpoints").glob("*/last.ckpt")
    assert 0 < torch.load(found, weights_only=True)["global_step"] < 40
    overrides = [f"resume={found.parent.name}"]
    resumed = train.run(compose_config("train", overrides), overrides)
    for name, value in weights(whole["run_id"], "last")["state_dict"].items():
        assert torch.equal(value, weights(resumed["run_id"], "last")["state_dict"][name]), name
    assert resumed["test/mse"] == whole["test/mse"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["data=sinusoid"], "learner: ProtoNet tells classes apart, but Sinusoid has real targets"),
        (
            ["data=sinusoid", "learner=baseline"],
            "learner: Transfer tells classes apart, but Sinusoid",
        ),
        (
            [RECIPE, "learner.loss=cross_entropy"],
            "learner.loss: found 'cross_entropy', but Sinusoid",
        ),
        (
            [RECIPE, "backbone=conv4", "~backbone.widths"],
            "backbone: Conv4 takes images, but an argument",
        ),
        ([RECIPE, "data.n_way=5"], "data.n_way: found 5; Input should be 1"),
        ([RECIPE, "+data.mean=[0.5]"], "data.mean: unknown key; allowed are amplitude"),
        ([RECIPE, "+data.augmentation=null"], "data.augmentation: unknown key"),
        ([RECIPE, "data.amplitude=3"], "data.amplitude: found 3"),
        ([RECIPE, "data.train_k_shot=[1,5]"], "data.train_k_shot: found"),
        (["published=[{learner:MAML,mse:0.4}]"], "published: found"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides, line):
    with pytest.raises(UserError) as error:
        config.check(compose_config("train", overrides))
    assert all(each.startswith(line) for each in set(str(error.value).splitlines()))


@pytest.mark.usefixtures("runs_folder")
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["data.amplitude=[5,1]"], r"data\.amplitude: found \[5, 1\]; give \[low, high\]"),
        (["also_test=[digits]"], "also_test: Digits has classes, but Sinusoid"),
        (["also_test=[{data:sinusoid,k_shot:3}]"], "also_test: k_shot: all test sets take that of"),
    ],
)
def test_what_does_not_fit_is_said_before_a_run_is_made(overrides, line):
    with pytest.raises(UserError, match=line):
        run_train(*overrides)


# --- sweeps


def test_a_sweep_looks_for_the_smallest_error(runs_folder: Path):
    from pipeline.study import search, settings, storage

    made = settings.read(compose_config("sweep", SMALL), SMALL)
    assert list(made.cfg.objectives) == ["val/mse"]
    assert made.mode == "min"
    of_classes = settings.read(compose_config("sweep", ["learner=maml"]), [])
    assert list(of_classes.cfg.objectives) == ["val/acc"]
    assert of_classes.mode == "max"
    for wrong in ("objectives=[val/acc]", "objectives=[adapt_seconds]"):
        with pytest.raises(UserError, match=r"objectives: found .*; allowed are \[val/mse\] and"):
            settings.read(compose_config("sweep", [*SMALL, wrong]), SMALL)
    with storage.closing(storage.open_storage(f"sqlite:///{runs_folder}/o.db", 15, 1)) as opened:
        study = search.make_study(made, opened, "fingerprint")
        assert study.direction == StudyDirection.MINIMIZE


@pytest.mark.slow
@pytest.mark.usefixtures("runs_folder")
def test_sweep():
    from pipeline import sweep

    overrides = [*SMALL, "space=maml_sinusoid", "n_trials=3", "workers=1", "pruner=none"]
    result = sweep.run(compose_config("sweep", overrides), overrides)
    client = store.connect()
    children = client.search_runs(
        [client.get_run(result["run_id"]).info.experiment_id], "tags.trial LIKE '%'"
    )
    found = [child.data.metrics["val/best_mse"] for child in children]
    assert len(found) == 3
    assert result["best_value"] == pytest.approx(min(found))
    with pytest.raises(UserError, match="a report ranks accuracies"):
        report.run(compose_config("report", [f"study={result['study']}"]))


def test_the_recipe_is_the_papers():
    cfg = compose_config("train", [RECIPE])
    learner = config.build_learner(cfg, (1, 1, 1))
    assert isinstance(learner, GradientLearner)
    assert sum(p.numel() for p in learner.parameters()) == (40 + 40) + (40 * 40 + 40) + (40 + 1)
    data = config.build_data(cfg.data)
    assert data._dataset("train")[[0]].support_x.shape == (1, 10, 1, 1, 1)
    assert data.meta_batch_size == 25
    assert cfg.trainer.max_steps == 70_000
