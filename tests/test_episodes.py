"""An episode is a pure function of (seed, split, index)."""

import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pipeline.data.episodes import (
    EpisodeBatches,
    EpisodeDataset,
    EpisodeSampler,
    Prefetched,
    choose_distinct,
)
from pipeline.data.pool import ImagePool
from pipeline.errors import UserError
from pipeline.metrics import EpisodeMean

SIZES = [7, 9, 8, 12, 7, 10, 30, 8]
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(8), SIZES))
NAMES = [f"class {i}" for i in range(8)]


FIXED_CLASSES = [[3, 4], [6, 0]]
FIXED_SUPPORT = [[86, 20], [19, 4]]


def make(n_way=3, k_shot=2, n_query=4, seed=0, split="train", classes=(0, 2, 3, 4, 6, 7), group=1):
    return EpisodeSampler(LABELS, classes, NAMES, n_way, k_shot, n_query, seed, split, group)


def dataset():
    images = np.arange(len(LABELS), dtype=np.uint8)[:, None, None, None].repeat(2, 2).repeat(2, 3)
    return EpisodeDataset(ImagePool.from_arrays(images, LABELS, NAMES), make())


@settings(max_examples=60, deadline=None)
@given(
    n_way=st.integers(2, 6), k_shot=st.integers(1, 3), n_query=st.integers(1, 4),
    seed=st.integers(0, 2**31), start=st.integers(0, 2**40), tasks=st.integers(1, 5),
)  # fmt: skip
def test_every_episode_is_valid(n_way, k_shot, n_query, seed, start, tasks):
    support, query, classes = make(n_way, k_shot, n_query, seed).sample(range(start, start + tasks))
    assert support.shape == (tasks, n_way, k_shot)
    assert query.shape == (tasks, n_way, n_query)
    images = np.concatenate([support, query], axis=2)
    assert (LABELS[images] == classes[:, :, None]).all()
    for task in range(tasks):
        assert (
            len(np.unique(images[task])) == images[task].size
        )  # so support and query are disjoint
        assert len(set(classes[task])) == n_way
        assert set(classes[task]) <= {0, 2, 3, 4, 6, 7}


@given(indices=st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_an_episode_does_not_depend_on_its_batch(indices):
    sampler = make()
    together = sampler.sample(indices)
    for position, index in enumerate(indices):
        alone = sampler.sample([index])
        for a, b in zip(together, alone, strict=True):
            assert (a[position] == b[0]).all()


def test_streams_differ_by_seed_split_and_index_and_repeat_exactly():
    first = make().sample(range(20))
    assert all((a == b).all() for a, b in zip(first, make().sample(range(20)), strict=True))
    for other in (make(seed=1), make(split="val")):
        assert (other.sample(range(20)).support != first.support).mean() > 0.8
    assert len({t.tobytes() for t in first.support}) == 20


def test_the_stream_is_fixed_for_good():
    """A change of these numbers changes every published table: it must be meant."""
    support, _, classes = make(n_way=2, k_shot=1, n_query=1).sample([0, 12345])
    assert classes.tolist() == FIXED_CLASSES
    assert support[..., 0].tolist() == FIXED_SUPPORT


def test_no_global_random_state_takes_part():
    def states():
        return (
            random.getstate(),
            np.random.get_state()[2],
            np.random.get_state()[1].tobytes(),
            torch.get_rng_state().tolist(),
        )

    before = states()
    dataset()[[1, 2]]
    assert states() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_same_batches(workers):
    data = dataset()
    loader = DataLoader(data, sampler=EpisodeBatches(2, 6), batch_size=None, num_workers=workers)
    for batch, indices in zip(loader, [[0, 1], [2, 3], [4, 5]], strict=True):
        assert batch.id.tolist() == indices
        assert torch.equal(batch.query_x, data[indices].query_x)
        assert batch.support_x.shape == (2, 6, 1, 2, 2)
        assert batch.support_x.dtype == torch.uint8
        assert batch.support_y.tolist() == [[0, 0, 1, 1, 2, 2]] * 2
        assert batch.query_y.tolist() == [[0] * 4 + [1] * 4 + [2] * 4] * 2


def test_default_collate_adds_the_tasks_axis():
    data = dataset()
    batch = next(iter(DataLoader(data, batch_size=3, sampler=[5, 6, 7])))
    for a, b in zip(batch[:-1], data[[5, 6, 7]][:-1], strict=True):
        assert torch.equal(a, b)
    assert data[5].support_x.shape == (6, 1, 2, 2)


def test_processes_share_the_stream():
    whole = [i for batch in EpisodeBatches(4, 24) for i in batch]
    shares = [[i for b in EpisodeBatches(4, 24, rank, 3) for i in b] for rank in range(3)]
    assert whole == list(range(24))
    assert shares[1] == [1, 4, 7, 10, 13, 16, 19, 22]
    assert sorted(i for share in shares for i in share) == whole
    uneven = [[i for b in EpisodeBatches(2, 7, rank, 2) for i in b] for rank in range(2)]
    assert uneven == [[0, 2, 4, 6], [1, 3, 5]]
    assert [len(EpisodeBatches(2, 7, rank, 2)) for rank in range(2)] == [2, 2]
    first, second = (EpisodeBatches(16, 33, rank, 2) for rank in range(2))  # 17 and 16 episodes
    assert [len(b) for b in first] == [9, 8]
    assert [len(b) for b in second] == [8, 8]  # nobody waits for a batch that is not there


def test_epochs_go_on_where_the_last_ended():
    seen = iter([0, 4, 12])
    batches = EpisodeBatches(2, 4, first=lambda: next(seen))
    assert list(batches) == [[0, 1], [2, 3]]
    assert list(batches) == [[4, 5], [6, 7]]
    assert list(batches) == [[12, 13], [14, 15]]
    again = EpisodeBatches(2, 4)
    assert list(again) == list(again) == [[0, 1], [2, 3]]


def test_ranges_draw_shapes_that_a_group_shares():
    sampler = make(n_way=(2, 5), k_shot=(1, 3), group=4)
    shapes = [sampler.shape(i) for i in range(400)]
    assert all(len(set(shapes[i : i + 4])) == 1 for i in range(0, 400, 4))
    assert {s[0] for s in shapes} == {2, 3, 4, 5}
    assert {s[1] for s in shapes} == {1, 2, 3}
    assert sampler.sample([8, 9]).support.shape[1:] == shapes[8]
    apart = next(i for i in range(0, 400, 4) if shapes[i] != shapes[i + 4])
    with pytest.raises(ValueError, match="different shapes"):
        sampler.sample([apart, apart + 4])


def test_choice_is_uniform_in_members_and_positions():
    key = np.arange(60_000, dtype=np.uint64)
    chosen = choose_distinct(key, np.full(len(key), 6), 3, stream=1)
    for position in range(3):
        counts = np.bincount(chosen[:, position], minlength=6)
        # 5 degrees of freedom: chi-square beyond 20.5 has probability 0.001
        assert (((counts - 10_000) ** 2) / 10_000).sum() < 20.5
    pairs = np.bincount(chosen[:, 0] * 6 + chosen[:, 1], minlength=36).reshape(6, 6)
    off = pairs[~np.eye(6, dtype=bool)]
    assert np.trace(pairs) == 0
    assert (((off - 2000) ** 2) / 2000).sum() < 58.3  # 29 degrees of freedom, 0.001


def test_too_much_asked_names_class_and_counts():
    with pytest.raises(UserError, match="n_way: 7 classes a task, but split 'train' has 6"):
        make(n_way=7)
    with pytest.raises(UserError, match=r"k_shot \+ n_query: 4 \+ 4 .* 'class 0' .* has 7"):
        make(k_shot=4)
    with pytest.raises(UserError, match="range"):
        make(n_way=(4, 2))


def test_episode_accuracy_counts_episodes():
    metric = EpisodeMean()
    metric.update(torch.tensor(0.5))
    metric.update(torch.tensor([1.0, 0.75]))
    result = metric.compute()
    assert result["acc"].item() == pytest.approx(0.75)
    assert result["acc_ci95"].item() == pytest.approx(1.96 * 0.25 / 3**0.5)


def test_a_thread_makes_the_next_batch_and_changes_none():

    threads = set()

    class Noting(EpisodeDataset):
        def __getitem__(self, index):
            threads.add(threading.current_thread().name)
            return super().__getitem__(index)

    plain = dataset()
    loader = DataLoader(
        Noting(plain.pool, plain.sampler), sampler=EpisodeBatches(2, 7), batch_size=None
    )
    fetched = Prefetched(loader)
    assert len(fetched) == 4
    for _ in range(2):  # epochs
        batches = list(fetched)
        assert [len(b.id) for b in batches] == [2, 2, 2, 1]
        for batch in batches:
            assert torch.equal(batch.query_x, plain[batch.id.tolist()].query_x)
    assert all(name.startswith("prefetch") for name in threads)


def test_indices_stand_for_the_images():
    plain = dataset()
    batch, rows = (
        plain[[3, 4]],
        EpisodeDataset(plain.pool, plain.sampler, indices_only=True)[[3, 4]],
    )
    images = torch.from_numpy(np.array(plain.pool.images))
    assert torch.equal(images[rows.support_x], batch.support_x)
    assert torch.equal(images[rows.query_x], batch.query_x)
    assert torch.equal(rows.query_y, batch.query_y)
