"""Matching and relation networks against their papers' equations, written out here."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.backbones import MLP, Conv4
from pipeline.functional import canonical_order
from pipeline.learners import relation_net
from pipeline.learners.matching_net import MatchingNet
from pipeline.learners.relation_net import RelationNet

ADAM = partial(torch.optim.Adam, lr=1e-3)
SUPPORT_Y = torch.tensor([[2, 0, 1, 2, 0, 2], [1, 1, 0, 2, 0, 1]])  # unequal shots, no order


class Vectors(nn.Flatten):
    """Images are embeddings already."""

    def __init__(self, out_dim: int) -> None:
        super().__init__()
        self.out_dim = out_dim


def embeddings(d: int, queries: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tasks: (2, 6, d) of the support set and (2, queries, d)."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    return draw(2, 6, d), draw(2, queries, d)


def matching_net(d: int, full_context: bool, scale: float = 1.0, steps: int = 3) -> MatchingNet:
    torch.manual_seed(0)
    return MatchingNet(Vectors(d), full_context, steps, scale, ADAM, None).double().eval()


def attention_by_hand(support, y, query, scale: float = 1.0) -> np.ndarray:
    """Eq. 1 of Vinyals et al., query by query and image by image: (q, 3) probabilities."""
    probabilities = np.zeros((len(query), 3))
    for j, x in enumerate(query):
        norms = [np.linalg.norm(x) * np.linalg.norm(s) for s in support]
        kernel = [math.exp(scale * (x @ s) / n) for s, n in zip(support, norms, strict=True)]
        for c, k in zip(y, kernel, strict=True):
            probabilities[j, c] += k / sum(kernel)
    return probabilities


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_matching_by_numpy(scale):
    support, query = embeddings(7)
    found = matching_net(7, False, scale).heads(support, SUPPORT_Y, query, 3)
    for t in range(2):
        expected = attention_by_hand(*(x[t].numpy() for x in (support, SUPPORT_Y, query)), scale)
        np.testing.assert_allclose(found[t].exp(), expected, rtol=1e-12)


def test_logits_are_log_probabilities():
    """So cross-entropy of them is the negative log-likelihood, and an empty image is no nan."""
    support, query = embeddings(7)
    support[0, 1] = 0
    query[1, 2] = 0
    learner = matching_net(7, False)
    logits = learner.heads(support, SUPPORT_Y, query, 3)
    torch.testing.assert_close(logits.exp().sum(2), torch.ones(2, 4).double())
    y = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    loss = learner.loss(logits, y)
    torch.testing.assert_close(loss, -logits.gather(2, y.unsqueeze(2)).squeeze(2))
    torch.testing.assert_close(logits[1, 2].exp(), torch.tensor([2 / 6, 3 / 6, 1 / 6]).double())


def test_the_most_that_a_cosine_of_scale_one_allows():
    support, y = torch.tensor([[[1.0, 0]] + [[-1.0, 0]] * 4]), torch.arange(5).unsqueeze(0)
    logits = matching_net(2, False).heads(support.double(), y, support[:, :1].double(), 5)
    assert logits[0, 0, 0].exp().item() == pytest.approx(math.e**2 / (math.e**2 + 4))


def test_far_labels_do_not_vanish_in_mixed_precision():
    a = torch.tensor([[[1.0, 0.01], [-1.0, 0]]])
    learner, y = matching_net(2, False, 40.0).float(), torch.tensor([[0, 1]])
    exact = learner.double().heads(a.double(), y, a.double(), 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = learner.float().heads(a, y, a, 2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)
    assert exact[0, 0, 1] < -79


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def lstm_step(weights: np.ndarray, bias: np.ndarray, inputs, cell) -> tuple[np.ndarray, ...]:
    """Input, forget, candidate and output gates of one step (torch's order of rows)."""
    i, f, g, o = np.split(weights @ np.concatenate(inputs) + bias, 4)
    cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(cell), cell


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def test_full_context_by_recurrence():
    """Appendix A: g is an LSTM run both ways plus the embedding, f attends for three steps."""
    d = 5
    learner = matching_net(d, True, scale=2.0, steps=3)
    support, query = embeddings(d)
    found = learner.heads(support, SUPPORT_Y, query, 3)
    p = {k: v.detach().numpy() for k, v in learner.named_parameters()}
    for t in range(2):
        y = SUPPORT_Y[t].numpy()
        order = np.lexsort([support[t].numpy().sum(1), y])  # by class, then by sum
        z, y = support[t].numpy()[order], y[order]
        context = z.copy()
        for suffix, steps in (("", range(6)), ("_reverse", reversed(range(6)))):
            names = [f"support_lstm.{n}_l0{suffix}" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]  # fmt: skip
            w, b = np.hstack([p[names[0]], p[names[1]]]), p[names[2]] + p[names[3]]
            h = cell = np.zeros(d)
            for i in steps:
                h, cell = lstm_step(w, b, (z[i], h), cell)
                context[i] += h
        w = np.hstack([p["query_cell.weight_ih"], p["query_cell.weight_hh"]])
        b = p["query_cell.bias_ih"] + p["query_cell.bias_hh"]
        embedded = []
        for x in query[t].numpy():
            h, cell = x, np.zeros(d)
            for _ in range(3):
                read = softmax(context @ h) @ context
                state, cell = lstm_step(w, b, (x, read, h), cell)
                h = state + x
            embedded.append(h)
        expected = attention_by_hand(context, y, np.stack(embedded), 2.0)
        np.testing.assert_allclose(found[t].detach().exp(), expected, rtol=1e-10)


def test_canonical_order_by_hand():
    z = torch.tensor([[1.0, 1], [0, 1], [5, 0], [-1, 3], [0, 0]])
    y = torch.tensor([1, 1, 0, 0, 1])
    assert canonical_order(z, y).tolist() == [3, 2, 4, 1, 0]
    both = canonical_order(
        torch.stack([z, z[[4, 2, 0, 1, 3]]]), torch.stack([y, y[[4, 2, 0, 1, 3]]])
    )
    assert both.tolist() == [[3, 2, 4, 1, 0], [4, 1, 0, 3, 2]]


def conv4(halvings: int, width: int = 4) -> Conv4:
    return Conv4(1, 28, width, "batch", "max_pool", halvings)


def relation(backbone: nn.Module, norm: str = "batch", pooled: str = "sum") -> RelationNet:
    torch.manual_seed(0)
    learner = RelationNet(backbone, 6, 3, norm, pooled, ADAM, None).double().eval()
    for part in learner.score:
        if isinstance(part, nn.BatchNorm2d):  # as after some training
            nn.init.uniform_(part.running_mean, -0.1, 0.1)
            nn.init.uniform_(part.running_var, 0.01, 0.1)
            nn.init.normal_(part.weight)
    return learner


def relation_by_hand(learner: RelationNet, pairs: torch.Tensor) -> torch.Tensor:
    """The paper's figure 2: convolution, norm, ReLU, pool, twice; two linear layers."""
    norm1, conv2, norm2 = (learner.score[i] for i in (0, 3, 4))
    x = pairs
    for conv, norm in ((learner.compare, norm1), (conv2, norm2)):
        x = F.conv2d(x, conv.weight, conv.bias, padding="same")
        if isinstance(norm, nn.BatchNorm2d):
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias,
                             training=learner.training)  # fmt: skip
        x = torch.relu(x)
        x = F.max_pool2d(x, 2) if x.shape[2] > 1 else x
    first, last = learner.score[8], learner.score[10]
    return torch.sigmoid(last(torch.relu(first(x.flatten(1)))))


@pytest.mark.parametrize(
    ("backbone", "maps"),
    [
        (lambda: conv4(2), (4, 7, 7)),
        (lambda: conv4(3), (4, 3, 3)),
        (lambda: conv4(4), (4, 1, 1)),
        (lambda: MLP(1, 28, [9], "batch"), (9, 1, 1)),
    ],
    ids=["7x7", "3x3", "1x1", "vector"],
)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pooled", ["sum", "mean"])
def test_relations_by_pairs(backbone, maps, training, pooled):
    """Concatenated maps of every query and class, through the module as the paper draws it."""
    learner = relation(backbone(), pooled=pooled).train(training)
    support, query = embeddings(math.prod(maps))
    pairs = [
        torch.cat([(one[y == c].sum if pooled == "sum" else one[y == c].mean)(0).view(maps), q.view(maps)])
        for one, y, queries in zip(support, SUPPORT_Y, query, strict=True)
        for q in queries
        for c in range(3)
    ]  # fmt: skip
    expected = relation_by_hand(learner, torch.stack(pairs)).view(2, 4, 3)
    torch.testing.assert_close(learner.heads(support, SUPPORT_Y, query, 3), expected)


def test_the_loss_of_relations_is_the_papers():
    """Squared error of one-hot targets; other losses take the same scores as logits."""
    learner = relation(conv4(4))
    support, query = embeddings(learner.backbone.out_dim)
    scores = learner.heads(support, SUPPORT_Y, query, 3)
    y = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    expected = torch.zeros(2, 4).double()
    for t in range(2):
        for j in range(4):
            target = [float(c == y[t, j]) for c in range(3)]
            squares = [(r - s) ** 2 for r, s in zip(scores[t, j], target, strict=True)]
            expected[t, j] = sum(squares) / 3
    torch.testing.assert_close(learner.loss(scores, y), expected)
    learner.loss_name = "cross_entropy"
    torch.testing.assert_close(learner.heads(support, SUPPORT_Y, query, 3).sigmoid(), scores)


def test_relations_in_parts_are_the_same(monkeypatch):
    learner = relation(conv4(2))
    support, query = embeddings(learner.backbone.out_dim)
    whole = learner.heads(support, SUPPORT_Y, query, 3)
    calls = []
    monkeypatch.setattr(relation_net, "CELLS", 1)
    monkeypatch.setattr(learner, "_scores", lambda *a, f=learner._scores: calls.append(1) or f(*a))
    torch.testing.assert_close(learner.heads(support, SUPPORT_Y, query, 3), whole)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "learner",
    [matching_net(16, False), matching_net(16, True), relation(conv4(3))],
    ids=["MatchingNet", "MatchingNet FCE", "RelationNet"],
)
def test_queries_do_not_see_each_other(learner):
    d = 16 if isinstance(learner, MatchingNet) else learner.backbone.out_dim
    support, query = embeddings(d)
    logits = learner.heads(support, SUPPORT_Y, query, 3)
    for j in range(4):
        alone = learner.heads(support, SUPPORT_Y, query[:, j : j + 1], 3)
        torch.testing.assert_close(alone, logits[:, j : j + 1], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(logits[:, 0], logits[:, 1])
