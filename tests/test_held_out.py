"""Photos that are judged by a learner adapted without them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.learners.held_out import FOLDS, accuracies_by_shots, folds, held_out_logits
from tests.test_learners import build


@given(st.lists(st.integers(1, 23), min_size=2, max_size=9))
def test_no_fold_holds_all_of_a_class(counts):
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    fold = folds(y)
    for c, n in enumerate(counts):
        own = fold[y == c]
        if n == 1:
            assert own.tolist() == [-1]
            continue
        sizes = np.bincount(own, minlength=1)
        assert own.min() >= 0
        assert own.max() < FOLDS
        assert sizes.max() < n
        assert sizes.max() - sizes[sizes > 0].min() <= 1


def test_a_fold_of_equal_classes_is_one_of_each():
    y = np.repeat([0, 1, 2], 4)
    fold = folds(y)
    for each in range(4):
        assert sorted(y[fold == each]) == [0, 1, 2]
    assert not np.array_equal(folds(y, seed=1), fold)
    assert np.array_equal(folds(y), fold)


@pytest.mark.parametrize("name", ["protonet", "maml", "pixel_centroid", "simple_shot"])
def test_each_is_judged_without_its_fold(name):
    learner = build(name).eval()
    torch.manual_seed(0)
    y = torch.tensor([0, 0, 1, 1, 1, 2])
    x = torch.rand(6, 1, 10, 10)
    told = []
    logits, held = held_out_logits(learner, x, y, told.append)
    assert sorted(held.tolist()) == [0, 1, 2, 3, 4]
    assert told[-1] == 5
    fold = torch.from_numpy(folds(y.numpy()))
    for row, i in zip(logits, held.tolist(), strict=True):
        others = fold != fold[i]
        with torch.no_grad():
            expected = learner.adapt(x[others], y[others])(x[fold == fold[i]])
        same = (fold == fold[i]).nonzero().flatten().tolist()
        torch.testing.assert_close(row, expected[same.index(i)], atol=1e-4, rtol=1e-4)


def test_nothing_to_leave_out():
    logits, held = held_out_logits(
        build("protonet").eval(), torch.rand(3, 1, 10, 10), torch.arange(3)
    )
    assert logits.shape == (0, 3)
    assert held.shape == (0,)


@pytest.mark.parametrize("name", ["protonet", "maml"])
def test_accuracy_by_shots_is_of_the_images_left_over(name):
    """The images of a class are copies of each other: one is enough."""
    learner = build(name).eval()
    x = torch.zeros(12, 1, 10, 10)
    y = torch.arange(3).repeat_interleave(4)
    torch.manual_seed(0)
    x[:] = torch.rand(3, 1, 10, 10)[y]
    found = accuracies_by_shots(learner, x, y, draws=3)
    assert list(found) == [1, 2, 3]
    assert all(len(each) == 3 for each in found.values())
    if name == "protonet":
        assert all((each == 1).all() for each in found.values())
    again = accuracies_by_shots(learner, x, y, draws=3)
    assert all((found[k] == again[k]).all() for k in found)
    assert accuracies_by_shots(learner, x[::4], y[::4]) == {}
