"""The contract of every head in conf/head, met through its YAML alone, and the learner under it."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from pipeline import config
from pipeline.compose import compose_config
from pipeline.heads.base import Head
from pipeline.learners import embedding, with_head
from pipeline.learners.embedding import EmbeddingLearner, base_mean
from pipeline.learners.evaluation import Scorer, adaptation_seconds
from pipeline.learners.with_head import WithHead
from tests.conftest import blob_data
from tests.test_learners import CONF as LEARNERS
from tests.test_learners import build, make_task

CONF = {p.stem: p for p in sorted(Path(__file__).parents[1].glob("conf/head/*.yaml"))}
FEWER = {"tim": ["head.steps=100"], "pt_map": ["head.steps=5"]}  # of the papers' many steps
D, N_WAY = 12, 3
BASE = torch.linspace(0.2, 1.4, D)


def build_head(name: str, *overrides: str) -> Head:
    cfg = compose_config("evaluate", [f"head={name}", *FEWER.get(name, []), *overrides])
    config.check_root(cfg, "evaluate")
    return config.build_head(cfg.head)


def make_embeddings(tasks: int = 4, shots: tuple[int, ...] = (2, 2, 2), queries: int = 5):
    """Support, labels and queries of some tasks; not negative, as after a ReLU."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(tasks, N_WAY, D, generator=generator)
    y = torch.arange(N_WAY).repeat_interleave(torch.tensor(shots))
    of_query = torch.arange(N_WAY).repeat_interleave(queries)

    def noisy(labels: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tasks, len(labels), D, generator=generator)
        return torch.relu(means[:, labels] + 0.6 * noise)

    return noisy(y), y, noisy(of_query), of_query


@pytest.fixture(params=CONF)
def head(request: pytest.FixtureRequest) -> Head:
    return build_head(request.param)


def test_logits_of_any_number_of_shots_in_every_mode(head):
    for shots in ((2, 2, 2), (1, 4, 2), (1, 1, 1)):
        s, y, q, of_query = make_embeddings(shots=shots)
        plain = head(s[0], y, N_WAY, BASE)(q[0])
        assert plain.shape == (15, N_WAY)
        assert plain.isfinite().all()
        with torch.inference_mode():
            inference = head(s[0], y, N_WAY, BASE)(q[0])
        torch.testing.assert_close(plain, inference, rtol=0, atol=0)
        right = [
            (head(a, y, N_WAY, BASE)(b).argmax(1) == of_query) for a, b in zip(s, q, strict=True)
        ]
        assert torch.stack(right).float().mean() > 0.8, "these classes are easy to tell apart"


def test_order_of_the_support_set_and_names_of_classes_do_not_matter(head):
    s, y, q, _ = make_embeddings(shots=(1, 4, 2))
    logits = head(s[0], y, N_WAY, BASE)(q[0])
    order = torch.tensor([3, 5, 0, 6, 1, 2, 4])
    torch.testing.assert_close(
        head(s[0][order], y[order], N_WAY, BASE)(q[0]), logits, rtol=1e-3, atol=1e-3
    )
    renamed = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        head(s[0], renamed[y], N_WAY, BASE)(q[0])[:, renamed], logits, rtol=1e-3, atol=1e-3
    )


def test_queries_are_classified_in_any_order(head):
    s, y, q, _ = make_embeddings()
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    logits = head(s[0], y, N_WAY, BASE)(q[0])
    torch.testing.assert_close(
        head(s[0], y, N_WAY, BASE)(q[0][order]), logits[order], rtol=1e-3, atol=1e-3
    )


def test_only_transductive_heads_look_at_the_other_queries(head):
    s, y, q, _ = make_embeddings()
    classify = head(s[0], y, N_WAY, BASE)
    together, alone = classify(q[0]), torch.cat([classify(one) for one in q[0].split(1)])
    assert alone.isfinite().all()
    if head.transductive:
        assert not torch.allclose(together.softmax(1), alone.softmax(1), atol=1e-5)
    else:
        torch.testing.assert_close(together, alone)


def test_stacked_tasks_are_as_one_by_one_and_inputs_stay(head):
    s, y, q, _ = make_embeddings(shots=(1, 4, 2))
    before = s.clone(), q.clone()
    with torch.inference_mode():
        stacked = torch.vmap(lambda a, b: head(a, y, N_WAY, BASE)(b))(s, q)
    singly = torch.stack([head(a, y, N_WAY, BASE)(b) for a, b in zip(s, q, strict=True)])
    torch.testing.assert_close(stacked, singly, rtol=1e-3, atol=1e-3)
    assert torch.equal(s, before[0])
    assert torch.equal(q, before[1])
    assert not list(head.parameters())


def test_a_class_and_a_query_without_any_feature_do_no_harm(head):
    s, y, q, _ = make_embeddings()
    s[0][y == 1] = 0
    q[0][4] = 0
    assert head(s[0], y, N_WAY, BASE)(q[0]).isfinite().all()


def test_only_centred_features_need_the_base_mean(head):
    s, y, q, _ = make_embeddings()
    same = torch.equal(head(s[0], y, N_WAY, BASE)(q[0]), head(s[0], y, N_WAY, 3 * BASE)(q[0]))
    assert same == (head.features != "CL2N")


@pytest.mark.parametrize("path", CONF.values(), ids=CONF)
def test_every_head_says_what_it_is_and_how_to_run_it(path):
    text = path.read_text()
    assert f"python -m pipeline.evaluate run=RUN_ID head={path.stem}" in text
    header = " ".join(line for line in text.splitlines() if line.startswith("#"))
    head = build_head(path.stem)
    assert ("Transductive" if head.transductive else "Inductive") in header
    assert set(OmegaConf.load(path)) == {"_target_", *config.parameters(type(head))}


def under(name: str, *overrides: str) -> WithHead:
    learner = build("protonet", *overrides)
    return WithHead(learner, build_head(name), base_mean(learner, blob_data())).eval()


@pytest.mark.parametrize("name", CONF)
def test_adapt_heads_and_the_scorer_agree(name):
    """One task by `adapt`, a batch by `predict`, embeddings made once: the same predictions."""
    learner, data = under(name), blob_data()
    scorer = Scorer(learner, data, "test")
    once = scorer.score(data.sampler("test", 3, 2, 4), 7)
    assert scorer._embedded is not None
    dataset = data._dataset("test")
    batch = data.on_after_batch_transfer(dataset[list(range(7))], 0)
    with torch.inference_mode():
        stacked = learner.predict(batch)
    for index, task in enumerate(batch.tasks()):
        logits = learner.adapt(task.support_x, task.support_y)(task.query_x)
        assert not logits.requires_grad
        torch.testing.assert_close(logits, stacked[index], rtol=2e-3, atol=2e-3)
        assert ((logits.argmax(1) == task.query_y).numpy() == once.correct[index]).all()


def test_the_protocol_is_that_of_head_and_norm():
    assert under("cosine").protocol == "inductive"
    assert under("tim").protocol == "transductive"
    assert under("tim").embeds_once
    transductive = under("cosine", "backbone.norm=batch_stats")
    assert transductive.protocol == "transductive"
    assert not transductive.embeds_once


def test_a_network_under_a_head_stays_as_it_was_trained():
    learner = under("baseline")
    assert learner.label == "ProtoNet + Baseline"
    assert not any(p.requires_grad for p in learner.parameters())
    assert sum(p.numel() for p in learner.parameters()) == sum(
        p.numel() for p in learner.trained.parameters()
    )
    before = {k: v.clone() for k, v in learner.trained.state_dict().items()}
    task = make_task()
    learner.adapt(task.support_x, task.support_y)(task.query_x)
    assert all(torch.equal(v, before[k]) for k, v in learner.trained.state_dict().items())


def test_the_base_mean_is_of_training_images(monkeypatch):
    learner, data = build("protonet"), blob_data()
    learner.train()
    found = base_mean(learner, data)
    assert learner.training
    assert torch.equal(found, base_mean(learner, data))
    learner.eval()
    pool = data.pool
    rows = [i for i, label in enumerate(pool.labels) if label in data.classes("train")]
    z = learner.embed(data.prepare(torch.from_numpy(pool.images[rows])))
    torch.testing.assert_close(found, z.mean(0).detach())
    monkeypatch.setattr(embedding, "BASE_IMAGES", 5)
    few = z[[i * (len(rows) - 1) // 4 for i in range(5)]].mean(0).detach()
    torch.testing.assert_close(base_mean(learner, data), few)


def test_tasks_are_stacked_within_bounds(monkeypatch):
    learner = under("laplacian_shot")
    s, y, q, _ = make_embeddings(tasks=5)
    learner.base_mean = BASE
    y = y.expand(5, -1)
    whole = learner.heads(s, y, q, N_WAY)
    sizes = []
    monkeypatch.setattr(with_head, "NUMBERS", 2 * 21 * 15)  # 6 + 15 images, pairs of 15 queries
    stacked = type(learner).__mro__[1].heads
    monkeypatch.setattr(
        type(learner).__mro__[1], "heads",
        lambda self, s, *rest: sizes.append(len(s)) or stacked(self, s, *rest),
    )  # fmt: skip
    torch.testing.assert_close(learner.heads(s, y, q, N_WAY), whole)
    assert sizes == [2, 2, 1]


def test_the_time_of_a_transductive_head_is_with_its_queries(monkeypatch):
    learner, asked = under("bd_cspn"), []
    inductive = under("nearest_mean")
    for each in (learner, inductive):
        forward = each.task_head.forward

        def counted(*inputs, forward=forward):
            classify = forward(*inputs)
            return lambda q: asked.append(len(q)) or classify(q)

        monkeypatch.setattr(each.task_head, "forward", counted)
    adaptation_seconds(inductive, blob_data(), "val", 3, 2, 4, tasks=2)
    assert asked == []
    adaptation_seconds(learner, blob_data(), "val", 3, 2, 4, tasks=2)
    assert set(asked) == {12}


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_the_embeddings_of_every_embedding_learner_do(name):
    learner = build(name)
    if not isinstance(learner, EmbeddingLearner):
        pytest.skip("no embeddings")
    head = WithHead(learner, build_head("bd_cspn"), None).eval()
    task = make_task()
    for n_way in (2, 3):  # another number than it was built for
        s, q = task.support_y < n_way, task.query_y < n_way
        logits = head.adapt(task.support_x[s], task.support_y[s])(task.query_x[q])
        assert logits.shape == (4 * n_way, n_way)
        assert logits.isfinite().all()
