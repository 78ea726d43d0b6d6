"""Pictures that look inside a learner: what is in them, for which learners, and where they go."""

from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA

from pipeline import evaluate
from pipeline.calibration import ece, fit_temperature
from pipeline.compose import compose_config
from pipeline.functional import principal_components
from pipeline.heads.nearest_mean import NearestMean
from pipeline.inside import look_inside
from pipeline.inside_figures import Embedded, Point, embedding_figure, shape_figure
from pipeline.learners import evaluation
from pipeline.learners.evaluation import Scorer
from pipeline.learners.features import embeddings
from pipeline.learners.gradient import GradientLearner
from pipeline.learners.nearest_point import NearestPoint
from pipeline.learners.pixel_centroid import PixelCentroid
from pipeline.learners.with_head import WithHead
from pipeline.scoreboard import FixedEpisodes, is_own, score_all
from pipeline.tracking import store
from tests.conftest import BlobSource, blob_data
from tests.test_learners import CONF, build
from tests.test_train import run_train

SEEN = {"hardest_blobs_3w2s_1", "hardest_blobs_3w2s_2", "hardest_blobs_3w2s_3",
        "embeddings_blobs_3w2s", "reliability_blobs_3w2s", "shots_ways_blobs_3w"}  # fmt: skip


class Kept:
    """A run that keeps what it is given."""

    def __init__(self) -> None:
        self.figures, self.metrics, self.tables = {}, {}, {}

    def log_figure(self, figure, path):
        figure.canvas.draw()  # what cannot be drawn fails here
        self.figures[path.removeprefix("figures/").removesuffix(".png")] = figure

    def log_metrics(self, values, step):
        assert step == 7
        self.metrics |= values

    def log_csv(self, frame, path):
        self.tables[path] = frame


def looked(learner, data=None, episodes=20, **changes) -> Kept:
    data, run, scorers = data or blob_data(), Kept(), {}
    test = FixedEpisodes(**{"name": "blobs", "data": data, "n_way": 3, "k_shot": 2, "n_query": 4,
                            "episodes": 30} | changes)  # fmt: skip
    learner.eval()
    own = [r for r in score_all(learner, [test], kept=scorers) if is_own(r, learner)]
    look_inside(run, learner, own, scorers, 7, episodes)
    return run


@pytest.mark.parametrize("name", ["protonet", "maml"])
def test_logits_are_those_of_adapt_and_what_scores_count(name, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 2)
    learner, data = build(name), blob_data()
    sampler, scorer = data.sampler("test", 3, 2, 4), Scorer(learner.train(), data, "test")
    told = []
    logits, y = scorer.logits(sampler, 5, told.append)
    assert learner.training
    assert told[-1] == 5
    scores = scorer.score(sampler, 5)
    assert ((logits.argmax(1) == y).numpy() == scores.correct.ravel()).all()
    learner.eval()
    for index in range(5):
        task = data.task(sampler, index, learner.device)
        alone = learner.adapt(task.support_x, task.support_y)(task.query_x).detach()
        torch.testing.assert_close(logits[12 * index : 12 * (index + 1)], alone)
        assert (y[12 * index : 12 * (index + 1)] == task.query_y).all()


def test_embeddings_are_what_a_head_sees():
    x = torch.rand(300, 1, 10, 10)  # more than are embedded at a time
    protonet = build("protonet").train()
    z = embeddings(protonet, x)
    assert protonet.training
    protonet.eval()
    torch.testing.assert_close(z[:2], protonet.backbone(x[:2]).detach())
    assert len(z) == 300
    torch.testing.assert_close(embeddings(WithHead(protonet, NearestMean(), None), x), z)
    maml = build("maml").eval()
    torch.testing.assert_close(maml.net.head(embeddings(maml, x)), maml.net(x))
    assert embeddings(build("cavia"), x).dim() == 2  # whose body yields maps
    torch.testing.assert_close(embeddings(PixelCentroid(), x), x.flatten(1))
    assert embeddings(NearestPoint(), x) is None


def test_principal_components_are_scikit_learns():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(40, 6)) * [9, 5, 3, 1, 1, 1] + 100
    points, shares = principal_components(torch.from_numpy(z), 2)
    oracle = PCA(2).fit(z)
    np.testing.assert_allclose(shares, oracle.explained_variance_ratio_)
    np.testing.assert_allclose(points.abs(), np.abs(oracle.transform(z)))
    assert (points.amax(0) == points.abs().amax(0)).all()
    flat, share = principal_components(torch.arange(5.0).unsqueeze(1), 2)
    assert flat[:, 1].tolist() == [0] * 5
    assert share.tolist() == [1, 0]
    assert not principal_components(torch.ones(4, 3), 2)[1].any()


def test_an_embedding_learner():
    learner, data = build("protonet"), blob_data()
    run = looked(learner, data)
    assert set(run.figures) == SEEN
    titles = [f.get_suptitle() or f.axes[0].get_title(loc="left") for f in run.figures.values()]
    assert all(t.startswith("ProtoNet on blobs, ") and "inductive" in t for t in titles)

    table = run.tables["inside/shots_ways_blobs_3w.csv"]
    tried = set(zip(table["n_way"], table["k_shot"], strict=True))
    # five test classes of 20 images, 4 of which are queries
    assert tried == {(3, 1), (3, 2), (3, 5), (3, 10), (2, 2), (5, 2)}
    scorer = Scorer(learner, data, "test")
    for row in table.to_dict("records"):
        sampler = data.sampler("test", row["n_way"], row["k_shot"], 4)
        mean, ci95 = scorer.score(sampler, 20).interval()
        assert (row["accuracy"], row["ci95"]) == (mean, ci95)

    shape = (3, 2, 4)
    held_out = Scorer(learner, data, "val").logits(data.sampler("val", *shape), 20)
    logits, y = scorer.logits(data.sampler("test", *shape), 20)
    t = fit_temperature(*held_out)
    assert run.metrics == {
        "test/blobs_3w2s/temperature": t,
        "test/blobs_3w2s/ece": ece(torch.softmax(logits.double(), 1), y),
        "test/blobs_3w2s/ece_scaled": ece(torch.softmax(logits.double() / t, 1), y),
    }


def test_the_hardest_episodes_are_drawn():
    learner, data = build("protonet"), blob_data(BlobSource(images=40))
    accuracies = Scorer(learner, data, "test").score(data.sampler("test", 3, 2, 4), 30).by_episode()
    worst = np.argsort(accuracies, kind="stable")
    figures = looked(learner, data).figures
    for place, rank in enumerate(("", "second ", "third ")):
        title = figures[f"hardest_blobs_3w2s_{place + 1}"].axes[0].get_title(loc="left")
        index, share = worst[place], 100 * accuracies[worst[place]]
        assert f"episode {index}, the {rank}hardest of 30: {share:.0f} % right" in title
    assert accuracies[worst[2]] < accuracies.mean()


def test_a_gradient_learner():
    learner, data = build("maml"), blob_data()
    run = looked(learner, data)
    assert set(run.figures) == SEEN | {"inner_steps_blobs_3w2s"}
    table = run.tables["inside/shots_ways_blobs_3w.csv"]
    assert set(table["n_way"]) == {3}  # its head takes no other
    assert len(run.figures["shots_ways_blobs_3w"].axes) == 1
    sampler = data.sampler("test", 3, 2, 4)
    mean = Scorer(learner, data, "test").score(sampler, 4).interval().mean
    assert float(table[table["k_shot"] == 2]["accuracy"].iloc[0]) == mean  # a fifth of 20
    curve = run.tables["inside/inner_steps_blobs_3w2s.csv"]
    assert curve["inner_steps"].tolist() == [0, 1, 2, 3, 5]
    half = Scorer(learner, data, "test").score(sampler, 2).interval().mean
    assert curve["query_accuracy"].iloc[-1] == pytest.approx(half)
    assert curve["support_loss"].iloc[-1] < curve["support_loss"].iloc[0]
    assert "transductive" in run.figures["embeddings_blobs_3w2s"].get_suptitle()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONF)
def test_every_learner_is_looked_into(name):
    learner = build(name)
    run = looked(learner, episodes=10)
    steps = {"inner_steps_blobs_3w2s"} if isinstance(learner, GradientLearner) else set()
    assert set(run.figures) == SEEN | steps


def test_no_validation_classes_no_reliability(capsys):
    class OnlyTest(BlobSource):
        def load(self):
            pool, splits = super().load()
            return pool, splits | {"val": []}

    run = looked(build("protonet"), blob_data(OnlyTest()))
    assert set(run.figures) == SEEN - {"reliability_blobs_3w2s"}
    assert not run.metrics
    line = "blobs: no validation classes, so no reliability diagram"
    assert capsys.readouterr().out.splitlines() == [line]
    run = looked(build("protonet"), blob_data(), n_way=5)  # of four validation classes
    assert "reliability_blobs_5w2s" not in run.figures
    assert "blobs_5w2s: no reliability diagram: n_way: 5" in capsys.readouterr().out


def test_a_learner_that_ran_away_has_no_map_and_no_reliability(capsys):
    learner = build("protonet")
    with torch.no_grad():
        next(learner.parameters()).fill_(torch.nan)
    assert set(looked(learner).figures) == SEEN - {
        "embeddings_blobs_3w2s",
        "reliability_blobs_3w2s",
    }
    assert "no reliability diagram: temperature: found logits that" in capsys.readouterr().out


def test_a_map_of_embeddings():
    points = np.array([[0, 0], [4, 4], [0, 1], [1, 0], [4, 3], [1, 1]], dtype=float)
    labels, predicted = np.array([0, 1, 0, 0, 1, 1]), np.zeros(4)
    task = Embedded(["left", "right"], points, np.array([0.7, 0.2]), labels, predicted)
    axis = embedding_figure(task, "title").axes[0]
    right, stars, wrong = (c.get_offsets().tolist() for c in axis.collections)
    assert stars == points[:2].tolist()
    assert right == points[[2, 3]].tolist()
    assert wrong == points[[4, 5]].tolist()
    assert axis.get_xlabel() == "first principal component, 70 % of the variance"
    named = [text.get_text() for text in axis.get_legend().get_texts()]
    assert named[-2:] == ["left", "right"]


def test_lines_of_shots_and_ways():
    points = [Point(5, 1, 0.5, 0.02), Point(5, 5, 0.7, 0.01), Point(2, 1, 0.8, 0.03)]
    shots, ways = shape_figure(points, 5, [1, 5], "title").axes
    assert shots.lines[0].get_xydata().tolist() == [[1, 50], [5, 70]]
    assert ways.lines[0].get_xydata().tolist() == [[2, 80], [5, 50]]
    assert len(ways.lines) == 2  # 1-shot and chance: of 5-shot there is a single point
    band = shots.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(48)
    assert band[:, 1].max() == pytest.approx(71)


@pytest.mark.usefixtures("runs_folder")
def test_evaluate_leaves_them_with_the_run(capsys):
    run_id = run_train("test=false", "trainer.max_steps=10", "also_test=[digits]")["run_id"]
    client = store.connect()

    def figures() -> set[str]:
        found = client.list_artifacts(run_id, "figures")
        return {f.path.removeprefix("figures/").removesuffix(".png") for f in found}

    few = [f"run={run_id}", "k_shot=1", "episodes=10", "inside_episodes=4"]
    evaluate.run(compose_config("evaluate", [*few, "inside=false"]))
    plain = figures()
    assert not any(name.startswith(("hardest", "embeddings", "shots", "rel")) for name in plain)
    evaluate.run(compose_config("evaluate", few))
    per_set = {"embeddings", "hardest", "reliability"}
    found = defaultdict(set)
    for name in figures() - plain:
        kind, _, rest = name.partition("_")
        found[kind].add(rest)
    assert set(found) == per_set | {"shots"}
    assert found["embeddings"] == {"glyphs_5w1s", "digits_5w1s"}
    assert found["reliability"] == {"glyphs_5w1s"}
    assert found["shots"] == {"ways_glyphs_5w", "ways_digits_5w"}
    assert "digits: no validation classes" in capsys.readouterr().out
    metrics = client.get_run(run_id).data.metrics
    assert 0 <= metrics["test/glyphs_5w1s/ece_scaled"] <= 1
    table = pd.read_csv(client.download_artifacts(run_id, "inside/shots_ways_digits_5w.csv"))
    assert set(table["n_way"]) == {2, 5, 10}

    head = [*few, "head=nearest_mean", "also_test=[]"]
    evaluate.run(compose_config("evaluate", head), head)
    assert {"embeddings_glyphs_5w1s_NearestMean", "shots_ways_glyphs_5w_NearestMean"} <= figures()
