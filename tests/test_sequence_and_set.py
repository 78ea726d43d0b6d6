"""SNAIL against one explicit sequence a query, FEAT against attention written out."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.backbones import Conv4
from pipeline.episode import Episode
from pipeline.learners import snail
from pipeline.learners.feat import Feat
from pipeline.learners.snail import AttentionBlock, DenseBlock, Snail, dilations
from tests.test_matching import ADAM, SUPPORT_Y, Vectors, embeddings


def build_snail(d: int = 6, shots: int | tuple[int, int] = (1, 2)) -> Snail:
    torch.manual_seed(0)
    return Snail(Vectors(d), 3, 5, shots, ADAM, None).double().eval()


def causal_sequence(learner: Snail, x: torch.Tensor) -> torch.Tensor:
    """(length, c) -> (length, n_way) by torch's dilated convolution and its causal attention."""
    for block in learner.blocks:
        if isinstance(block, DenseBlock):
            kernel = torch.stack([block.before.weight, block.now.weight], 2)  # (2f, c, 2)
            padded = F.pad(x.T.unsqueeze(0), (block.dilation, 0))
            y = F.conv1d(padded, kernel, block.now.bias, dilation=block.dilation)[0].T
            f, g = y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]
            x = torch.cat([x, torch.tanh(f) * torch.sigmoid(g)], 1)
        else:
            q, k, v = (part(x).unsqueeze(0) for part in (block.query, block.key, block.value))
            x = torch.cat([x, F.scaled_dot_product_attention(q, k, v, is_causal=True)[0]], 1)
    return learner.classify(x)


def test_one_pass_for_all_queries_equals_one_sequence_each(monkeypatch):
    learner = build_snail()
    support, query = embeddings(6)
    found = learner.heads(support, SUPPORT_Y, query, 3)
    for t in range(2):
        y = SUPPORT_Y[t]
        order = sorted(range(6), key=lambda i: (int(y[i]), float(support[t, i].sum())))
        labelled = torch.cat([support[t, order], torch.eye(3).double()[y[order]]], 1)
        for j in range(4):
            last = torch.cat([query[t, j], torch.zeros(3).double()])
            logits = causal_sequence(learner, torch.cat([labelled, last.unsqueeze(0)]))[-1]
            torch.testing.assert_close(found[t, j], logits, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(snail, "CELLS", 1)  # task by task
    torch.testing.assert_close(learner.heads(support, SUPPORT_Y, query, 3), found)


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_a_dense_block_reaches_back_one_dilation(dilation):
    torch.manual_seed(0)
    block = DenseBlock(3, 2, dilation).double()
    x = torch.randn(1, 9, 3, dtype=torch.float64)
    impulse = x.clone()
    impulse[0, 2] += 1
    m = 8  # the last token is a query
    changed = (block(x, m) != block(impulse, m))[0, :, 3:].any(1).nonzero().flatten().tolist()
    assert changed == [i for i in (2, 2 + dilation) if i < 9]


def test_no_token_sees_what_comes_after_it():
    learner = build_snail()
    m, x = 6, torch.randn(1, 10, 9, dtype=torch.float64)  # 6 of the sequence, 4 queries
    for position in range(10):
        other = x.clone()
        other[0, position] += 1
        a, b = x, other
        for block in learner.blocks:
            a, b = block(a, m), block(b, m)
        changed = (a != b)[0, :, 9:].any(1).nonzero().flatten().tolist()
        assert changed == (list(range(position, 10)) if position < m else [position])


@pytest.mark.parametrize(("length", "expected"), [(6, [1, 2, 4]), (8, [1, 2, 4]), (9, [1, 2, 4, 8]),
                                                  (26, [1, 2, 4, 8, 16])])  # fmt: skip
def test_dilations_reach_the_first_step_and_no_more_than_needed(length, expected):
    assert dilations(length) == expected
    torch.manual_seed(0)
    for used, reached in ((expected, True), (expected[:-1], False)):
        x = torch.randn(1, length, 2, dtype=torch.float64, requires_grad=True)
        y, channels = x, 2
        for dilation in used:
            y = DenseBlock(channels, 3, dilation).double()(y, length - 1)
            channels += 3
        (gradient,) = torch.autograd.grad(y[0, -1].sum(), x)
        assert bool((gradient[0] != 0).any(1).all()) == reached


def test_the_label_has_a_length():
    support, query = embeddings(6)
    with pytest.raises(ValueError, match="n_way: 4 classes, but this SNAIL was trained for 3"):
        build_snail().heads(support, SUPPORT_Y, query, 4)
    blocks = [sum(isinstance(b, kind) for b in build_snail(shots=s).blocks)
              for s in (1, (1, 5)) for kind in (DenseBlock, AttentionBlock)]  # fmt: skip
    assert blocks == [4, 3, 8, 3]  # two stacks of log2(4) and log2(16)


def build_feat(backbone: nn.Module, contrast: float = 0.0) -> Feat:
    torch.manual_seed(0)
    learner = Feat(backbone, 2.0, contrast, 3.0, 0.5, ADAM, None).double().eval()
    nn.init.normal_(learner.norm.weight)
    nn.init.normal_(learner.norm.bias)
    return learner


def without_dropout(learner: Feat) -> Feat:
    learner.train()
    learner.dropout.p = learner.attention.dropout = 0.0
    return learner


def set_to_set(learner: Feat, z: torch.Tensor) -> torch.Tensor:
    """(m, d): LayerNorm(z + softmax(Q K' / sqrt(d)) V W), each row written out."""
    query, key, value = (z @ w.T for w in learner.attention.in_proj_weight.chunk(3))
    rows = []
    for i in range(len(z)):
        weight = torch.stack([query[i] @ key[j] for j in range(len(z))]) / z.shape[1] ** 0.5
        read = (weight.exp() / weight.exp().sum()) @ value
        row = z[i] + learner.attention.out_proj.weight @ read
        centred = row - row.mean()
        scaled = centred / (centred.square().mean() + 1e-5).sqrt()
        rows.append(scaled * learner.norm.weight + learner.norm.bias)
    return torch.stack(rows)


def test_adapted_prototypes_by_hand():
    learner = build_feat(Vectors(6))
    support, query = embeddings(6)
    found = learner.heads(support, SUPPORT_Y, query, 3)
    for t in range(2):
        means = torch.stack([support[t, SUPPORT_Y[t] == c].mean(0) for c in range(3)])
        adapted = set_to_set(learner, means)
        expected = torch.stack([-(q - adapted).square().sum(1) / 2.0 for q in query[t]])
        torch.testing.assert_close(found[t], expected, rtol=1e-9, atol=1e-9)


def test_the_set_function_is_equivariant():
    """Renaming the classes renames the logits, though each prototype depends on all."""
    learner = build_feat(Vectors(6))
    support, query = embeddings(6)
    logits = learner.heads(support, SUPPORT_Y, query, 3)
    renamed = torch.tensor([2, 0, 1])[SUPPORT_Y]
    torch.testing.assert_close(learner.heads(support, renamed, query, 3), logits[..., [1, 2, 0]])
    other = support.clone()
    other[SUPPORT_Y == 2] += 1
    assert not torch.allclose(learner.heads(other, SUPPORT_Y, query, 3)[..., 0], logits[..., 0])


def test_contrastive_loss_class_by_class():
    learner = build_feat(Vectors(6))
    z, y = (
        embeddings(6, 9)[1],
        torch.tensor([[0, 2, 1, 1, 0, 2, 2, 0, 1], [2, 2, 1, 0, 0, 1, 1, 2, 0]]),
    )
    losses = []
    for t in range(2):
        centres = torch.stack([set_to_set(learner, z[t, y[t] == c]).mean(0) for c in range(3)])
        for x, label in zip(z[t], y[t], strict=True):
            scores = -(x - centres).square().sum(1) / 3.0
            losses.append(scores.exp().sum().log() - scores[label])
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(learner.contrastive_loss(z, y, 3), expected, rtol=1e-9, atol=0)


def make_batch() -> Episode:
    images = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(3).repeat(2).expand(2, -1)
    return Episode(images(2, 6, 1, 16, 16), y, images(2, 6, 1, 16, 16), y, torch.arange(2), 3)


@pytest.mark.parametrize("norm", ["group", "batch_stats"])
def test_training_adds_the_contrastive_term(norm):
    learner = without_dropout(build_feat(Conv4(1, 16, 4, norm, "stride"), contrast=0.7))
    batch = make_batch()
    objective, loss, _ = learner.meta_loss(batch)
    logits = learner.predict(batch)  # as adapt does it, also where the norm sees the batch
    torch.testing.assert_close(loss, F.cross_entropy(logits.mT, batch.query_y).detach())
    z = torch.stack([torch.cat([learner.embed(t.support_x), learner.embed(t.query_x)])
                     for t in batch.tasks()])  # fmt: skip
    term = learner.contrastive_loss(z, torch.cat([batch.support_y, batch.query_y], 1), 3)
    torch.testing.assert_close(objective, loss + 0.7 * term)
    assert term > 0


@pytest.mark.parametrize(
    "build", [build_snail, lambda: build_feat(Vectors(6))], ids=["SNAIL", "FEAT"]
)
def test_queries_do_not_see_each_other(build):
    learner = build()
    support, query = embeddings(6)
    logits = learner.heads(support, SUPPORT_Y, query, 3)
    for j in range(4):
        alone = learner.heads(support, SUPPORT_Y, query[:, j : j + 1], 3)
        torch.testing.assert_close(alone, logits[:, j : j + 1], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(logits[:, 0], logits[:, 1])
