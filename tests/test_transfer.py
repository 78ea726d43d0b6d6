"""Learners that train on batches of images, and training that starts from another run's network."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from pipeline import checkpoints, config, train
from pipeline.compose import compose_config
from pipeline.data.episodes import EpisodeBatches
from pipeline.data.passes import ImageSampler
from pipeline.data.transforms import Augmentation
from pipeline.errors import UserError
from pipeline.heads.simple_shot import SimpleShot
from pipeline.learners import embedding
from pipeline.learners.transfer import CosineClassifier, Transfer
from pipeline.seen import Seen
from pipeline.tracking import store
from pipeline.trained import open_run
from tests.conftest import BlobSource, blob_data
from tests.test_train import SMALL, run_train

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [7, 9, 8, 12, 7]))
CLASSES = [4, 0, 3]  # 7 + 7 + 12 images


class Flat(nn.Module):
    """Images (m, 1, 10, 10) -> (m, 6), with a norm that keeps statistics."""

    out_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(100, 6), nn.BatchNorm1d(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def learner(classifier: str = "linear", label_smoothing: float = 0.0) -> Transfer:
    torch.manual_seed(0)
    return Transfer(
        Flat(), 9, classifier, 3.0, label_smoothing, SimpleShot("CL2N"),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1), None,
    )  # fmt: skip


def fit(model: Transfer, steps: int, start: str | None = None) -> pl.Trainer:
    """Two validations in 8 steps; the weights of a learner in training are those of a checkpoint."""
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, enable_checkpointing=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    augmentation = Augmentation(affine=0.1, crop_padding=1, flip=True, jitter=0.2)
    data = blob_data(images_per_batch=50, augmentation=augmentation)
    trainer.fit(model, data, ckpt_path=start, weights_only=True)
    return trainer


def test_every_pass_holds_every_image_of_the_split_once():
    sampler = ImageSampler(LABELS, CLASSES, seed=0, split="train")
    mine = np.flatnonzero(np.isin(LABELS, CLASSES))
    assert len(sampler) == len(mine) == 26
    rows, y = sampler.sample(range(5 * 26))
    passes = rows.reshape(5, 26)
    assert (np.sort(passes, axis=1) == mine).all()
    assert len({each.tobytes() for each in passes}) == 5
    assert (np.array(CLASSES)[y] == LABELS[rows]).all()


def test_an_image_depends_on_seed_split_and_index_alone():
    sampler = ImageSampler(LABELS, CLASSES, 0, "train")
    whole, _ = sampler.sample(range(100))
    backwards = [int(sampler.sample([i])[0][0]) for i in reversed(range(100))]
    assert backwards[::-1] == whole.tolist()
    for other in (ImageSampler(LABELS, CLASSES, 1, "train"), ImageSampler(LABELS, CLASSES, 0, "x")):
        assert (other.sample(range(100))[0] != whole).mean() > 0.8


def test_the_order_of_a_pass_is_that_of_splitmix64():
    """Steele, Lea, Flood 2014, in plain integers. Another order would change every training."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def number(place: int, number_of_pass: int) -> int:
        counter = (number_of_pass << 32) + 1 + place
        return mix((start + counter * 0x9E3779B97F4A7C15) % 2**64)

    start = mix(int.from_bytes(hashlib.sha256(b"7/train/images").digest()[:8], "little"))
    mine = [row for row, label in enumerate(LABELS) if label in CLASSES]
    rows, _ = ImageSampler(LABELS, CLASSES, 7, "train").sample(range(3 * 26))
    for each in range(3):
        order = sorted(range(26), key=lambda place: number(place, each))
        assert rows[26 * each : 26 * each + 26].tolist() == [mine[i] for i in order]


def test_processes_share_a_pass():
    sampler = ImageSampler(LABELS, CLASSES, 0, "train")
    shares = [
        [sampler.sample(batch)[0] for batch in EpisodeBatches(13, 26, rank, 2)] for rank in range(2)
    ]
    assert [len(batch) for share in shares for batch in share] == [13, 13]
    both = np.concatenate([np.concatenate(share) for share in shares])
    assert len(set(both.tolist())) == 26


def test_a_resumed_stream_is_the_uninterrupted_one():
    def batches(step: int) -> list:
        data = blob_data(images_per_batch=50, batches_per_epoch=4)
        data.trainer = SimpleNamespace(
            global_step=step, accumulate_grad_batches=1, max_steps=-1, global_rank=0, world_size=1,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )  # fmt: skip
        return list(data.train_dataloader())

    first, then, later = batches(0), batches(4), batches(2)
    assert torch.cat([b.id for b in first + then]).tolist() == list(range(400))
    for a, b in zip(first[2:] + then[:2], later, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    ids = torch.cat([b.id for b in first])
    source = BlobSource()
    assert first[0].x.dtype == torch.uint8
    sampler = ImageSampler(source.labels, range(9), 0, "train")
    rows, y = sampler.sample(ids.numpy())
    assert (torch.cat([b.x for b in first]).numpy() == source.images[rows]).all()
    assert (torch.cat([b.y for b in first]).numpy() == source.labels[rows]).all()
    assert (torch.cat([b.y for b in first]).numpy() == y).all()


def test_augmentation_is_of_the_image_alone_and_the_pool_may_lie_on_the_device():
    augmentation = Augmentation(affine=0.1, crop_padding=2, flip=True, jitter=0.3)
    data = blob_data(images_per_batch=4, augmentation=augmentation)
    data.trainer = SimpleNamespace(
        training=True, global_rank=0, world_size=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    together = data.on_after_batch_transfer(data._dataset("train")[[7, 3, 200]], 0)
    alone = [data.on_after_batch_transfer(data._dataset("train")[[i]], 0).x for i in (7, 3, 200)]
    assert torch.equal(together.x, torch.cat(alone))
    data._resident = torch.from_numpy(data.pool.images)  # "the device" is the CPU
    rows = data._dataset("train")[[7, 3, 200]]
    assert rows.x.shape == (3,)
    rows = data.transfer_batch_to_device(rows, torch.device("cpu"), 0)
    assert torch.equal(data.on_after_batch_transfer(rows, 0).x, together.x)
    data.trainer.training = False
    assert not torch.equal(data.on_after_batch_transfer(rows, 0).x, together.x)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_cross_entropy_over_all_training_classes(smoothing):
    model = learner(label_smoothing=smoothing).eval()
    data = blob_data(images_per_batch=20)
    batch = data.on_after_batch_transfer(data._dataset("train")[list(range(20))], 0)
    loss, reported, accuracy = model.meta_loss(batch)
    z = model.backbone(batch.x).detach().double().numpy()
    weight, bias = (p.detach().double().numpy() for p in model.classifier.parameters())
    logits = z @ weight.T + bias
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    right = log_p[np.arange(20), batch.y]
    by_hand = -(1 - smoothing) * right.mean() - smoothing * log_p.mean()
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert reported.item() == loss.item()
    assert accuracy.item() == pytest.approx((logits.argmax(1) == batch.y.numpy()).mean())


def test_the_classifier_of_baseline_plus_plus_is_a_cosine_times_a_learned_length():
    torch.manual_seed(0)
    layer, z = CosineClassifier(4, 3, scale=2.5), torch.randn(5, 4)
    length, direction = (p.detach().numpy() for p in layer.parameters())
    assert (length.shape, direction.shape) == ((3, 1), (3, 4))
    rows = z.numpy()
    norms = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(direction, axis=1)
    by_hand = 2.5 * length[:, 0] * (rows @ direction.T) / norms
    np.testing.assert_allclose(layer(z).detach(), by_hand, rtol=1e-5)
    with torch.no_grad():
        before = layer(z)
        for name, parameter in layer.named_parameters():
            parameter.mul_(3 if name.endswith("original1") else 1)  # the direction, made longer
        torch.testing.assert_close(layer(7 * z), before)


def test_the_base_mean_is_that_of_the_training_images(monkeypatch):
    model = learner()
    fit(model, 4)
    source = BlobSource()
    images = (source.images[source.labels < 9] / 255 - 0.5) / 0.25  # half of the classes train
    with torch.no_grad():
        z = model.eval().backbone(torch.from_numpy(images).float())
    torch.testing.assert_close(model.base_mean, z.mean(0), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(embedding, "BASE_IMAGES", 9)
    spread = z[[0, 22, 44, 67, 89, 111, 134, 156, 179]]  # of 180 images, class after class
    torch.testing.assert_close(
        embedding.base_mean(model, blob_data()), spread.mean(0), rtol=1e-4, atol=1e-5
    )


def test_a_training_in_two_parts_is_the_one_in_one(tmp_path):
    whole = learner()
    fit(whole, 8)
    fit(learner(), 4).save_checkpoint(tmp_path / "half.ckpt")
    resumed = learner()
    fit(resumed, 8, tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.usefixtures("runs_folder")
def test_training_starts_from_the_network_of_another_run(capsys):
    options = ["trainer.max_steps=10", "trainer.log_every_n_steps=5", "test_k_shot=[1]"]
    first = run_train("learner=simple_shot", *options)["run_id"]
    client = store.connect()
    run = client.get_run(first).data
    assert run.params["learner.n_train_classes"] == "30"
    assert run.metrics["train/images_per_s"] > 0
    assert "images/s" in capsys.readouterr().out
    model, _ = open_run(first)  # without its data
    assert model.classifier.out_features == 30
    assert model.base_mean.abs().sum() > 0
    path = store.find_checkpoint(first, "best")
    stored = torch.load(path, weights_only=True)["state_dict"]

    for name, prefix in (("meta_baseline", "backbone."), ("maml", "net.body.")):
        cfg = compose_config("train", [*SMALL, f"learner={name}"])
        other = config.build_learner(cfg, (1, 28, 28))
        before = {k: v.clone() for k, v in other.state_dict().items()}
        assert checkpoints.start_from(other, path).startswith("init_from: ")
        for key, value in other.state_dict().items():
            inside = key.startswith(prefix)
            known = stored[key.replace(prefix, "backbone.")] if inside else before[key]
            assert torch.equal(value, known), key
    wider = config.build_learner(compose_config("train", ["backbone.width=4"]), (1, 28, 28))
    with pytest.raises(UserError, match=r"init_from: no weight of the Transfer in .* fits the "):
        checkpoints.start_from(wider, path)

    options = ["learner=meta_baseline", *options]
    with pytest.raises(UserError, match=r"init_from: no run 'nothing' in"):
        run_train(*options, "init_from=nothing")
    seen = r"test set glyphs: 2 of its classes \(kanji/.*\) are in the training or validation split"
    with pytest.raises(UserError, match=seen):  # its test kanji trained the other run
        run_train(*options, f"init_from={first}", "data.n_train=10")
    second = run_train(*options, f"init_from={first}", "data.n_val=9")["run_id"]
    assert "init_from: 24 of 24 tensors of the network, Transfer at " in capsys.readouterr().out
    assert client.get_run(second).data.params["init_from"] == first
    own, before = checkpoints.stored_seen(store.find_checkpoint(second, "best"))
    assert [before] == checkpoints.stored_seen(path)
    assert (len(own.classes), len(before.classes)) == (39, 38)

    client.delete_run(first)
    path.unlink()
    resume = [f"resume={second}"]
    assert train.run(compose_config("train", resume), resume)["run_id"] == second
    own_again, before_again = checkpoints.stored_seen(store.find_checkpoint(second, "last"))
    assert (own_again, before_again) == (own, before)


def test_a_checkpoint_from_before_there_were_starts(tmp_path):
    """It holds one record of what was seen, and no `init_from`."""
    seen = {"source": "s", "data": "d", "fingerprint": "f", "classes": ["a"]}
    torch.save({"pipeline": {"config": {"seed": 3}, "seen": seen}}, tmp_path / "old.ckpt")
    assert checkpoints.stored_seen(tmp_path / "old.ckpt") == [Seen(**seen)]
    assert checkpoints.restore_config(tmp_path / "old.ckpt") == {"seed": 3, "init_from": None}


@pytest.mark.usefixtures("runs_folder")
def test_another_number_of_training_classes_is_refused():
    with pytest.raises(UserError, match=r"learner\.n_train_classes: found 7, but glyphs has 30 "):
        run_train("learner=simple_shot", "learner.n_train_classes=7")
    cfg = compose_config("train", ["learner=simple_shot", "data=digits"])
    with pytest.raises(UserError, match=r"data\.images_per_batch: split 'train' has 0 classes"):
        train.run(cfg)
