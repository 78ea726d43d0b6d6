"""EpisodicDataModule: splits, preparation and augmentation."""

import numpy as np
import pytest
import torch

from pipeline.data.datamodule import refuse_overlap
from pipeline.data.transforms import Augmentation, to_float
from pipeline.errors import UserError
from tests.conftest import BlobSource, blob_data

ALL = Augmentation(affine=0.1, crop_padding=2, flip=True, jitter=0.3)


class Overlapping(BlobSource):
    def load(self):
        pool, splits = super().load()
        return pool, splits | {"val": [*splits["val"], splits["train"][3]]}


def test_a_class_in_two_splits_is_refused():
    with pytest.raises(UserError, match="class 'blob 3' is in both 'train' and 'val'"):
        blob_data(Overlapping()).setup("fit")
    refuse_overlap({"train": ["a"], "val": [], "test": ["b"]})


def test_every_split_that_is_too_small_is_named():
    with pytest.raises(UserError) as error:
        blob_data(train_n_way=99, n_way=88).setup("fit")
    first, second = str(error.value).splitlines()
    assert first.startswith("data.train_n_way: 99 classes a task, but split 'train' has 9")
    assert second.startswith("data.n_way: 88 classes a task, but split 'val' has 4")


def test_images_are_bytes_until_they_are_on_the_device():
    data = blob_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.support_x.dtype == torch.uint8
    ready = data.on_after_batch_transfer(batch, 0)
    assert ready.support_x.dtype == torch.float32
    expected = (batch.support_x.numpy() / 255 - 0.5) / 0.25
    np.testing.assert_allclose(ready.support_x, expected, atol=1e-6)


class Training:
    """As much of a Trainer as the data module asks for."""

    training, global_rank, world_size = True, 0, 1


def test_augmentation_is_for_training_and_a_function_of_the_episode():
    data = blob_data(augmentation=ALL)
    data.setup("fit")
    batch = data._dataset("train")[[4, 5]]
    parts = [data._dataset("train")[[i]] for i in (4, 5)]
    plain = data.on_after_batch_transfer(batch, 0).query_x
    data.trainer = Training()
    once = data.on_after_batch_transfer(batch, 0).query_x
    torch.manual_seed(99)
    assert torch.equal(once, data.on_after_batch_transfer(batch, 0).query_x)
    assert not torch.equal(once, plain)
    alone = [data.on_after_batch_transfer(part, 0).query_x for part in parts]
    assert torch.equal(once, torch.cat(alone))  # whichever batch or process it comes to
    data.trainer.training = False
    assert torch.equal(plain, data.on_after_batch_transfer(batch, 0).query_x)


def test_other_channels_and_sizes_are_adapted():
    data = blob_data(BlobSource(shape=(3, 12, 12)), image_shape=(1, 28, 28))
    assert data.image_shape == (1, 28, 28)
    assert data.prepare(torch.zeros(2, 3, 12, 12, dtype=torch.uint8)).shape == (2, 1, 28, 28)
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    grey = to_float(red, (1, 1, 1), [0.0], [1.0])
    assert grey.item() == pytest.approx(0.299)
    rgb = to_float(torch.full((1, 1, 4, 4), 51, dtype=torch.uint8), (3, 8, 8), [0.1] * 3, [2.0] * 3)
    torch.testing.assert_close(rgb, torch.full((1, 3, 8, 8), 0.05))


def test_crop_moves_an_image_whole():
    image = torch.zeros(64, 2, 8, 8, dtype=torch.uint8)
    image[:, 0, 3:5, 3:5], image[:, 1, 3:5, 3:5] = 100, 200
    generator = torch.Generator().manual_seed(0)
    out = Augmentation(affine=0, crop_padding=2, flip=False, jitter=0)(image, generator)
    assert (out.flatten(1).sum(1, dtype=torch.int64) == 1200).all()
    assert (out[:, 1] == 2 * out[:, 0]).all()  # channels move together
    places = {tuple(o[0].nonzero()[0].tolist()) for o in out}
    assert len(places) > 15
    assert {p for p, _ in places} == {1, 2, 3, 4, 5}


def test_flip_and_jitter():
    ramp = torch.arange(8, dtype=torch.uint8).mul(30).expand(64, 3, 8, 8).contiguous()
    generator = torch.Generator().manual_seed(0)
    out = Augmentation(affine=0, crop_padding=0, flip=True, jitter=0)(ramp, generator)
    flipped = (out[:, 0, 0, 0] == 210).float().mean()
    assert 0.3 < flipped < 0.7
    assert torch.equal(out[out[:, 0, 0, 0] == 210][0], ramp[0].flip(-1))
    bright = Augmentation(affine=0, crop_padding=0, flip=False, jitter=0.4)(ramp, generator)
    means = bright.float().mean((1, 2, 3))
    assert means.min() < 0.8 * 105
    assert means.max() > 1.2 * 105


def test_no_affine_displacement_is_the_identity():
    image = torch.randint(0, 256, (4, 1, 9, 9), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    out = Augmentation(affine=1e-7, crop_padding=0, flip=False, jitter=0)(image, generator)
    assert torch.equal(out, image)


def test_a_pool_on_the_device_gives_the_same_batch(monkeypatch):
    """As on a GPU that the pool fits on: the loader yields rows, the images are gathered there."""
    data = blob_data(augmentation=ALL)
    plain = data.on_after_batch_transfer(data._dataset("train")[[4, 5]], 0)
    data._resident = torch.from_numpy(data.pool.images)  # "the device" is the CPU
    rows = data._dataset("train")[[4, 5]]
    assert rows.support_x.dtype == torch.int64
    batch = data.transfer_batch_to_device(rows, torch.device("cpu"), 0)
    batch = data.on_after_batch_transfer(batch, 0)
    assert torch.equal(batch.support_x, plain.support_x)
    assert torch.equal(batch.query_x, plain.query_x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_pool_moves_to_a_gpu_that_holds_it():
    data = blob_data()
    assert data.keep_on(torch.device("cuda", 0))
    rows = torch.tensor([[3, 1], [4, 1]])
    images = data.images(rows, torch.device("cuda", 0))
    assert torch.equal(images.cpu(), data.images(rows, torch.device("cpu")))
