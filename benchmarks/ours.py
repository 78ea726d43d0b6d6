"""Training steps of the pipeline, built from its configuration, in the state of a training."""

from collections.abc import Callable

import numpy as np
import torch
from omegaconf import OmegaConf

from pipeline import config
from pipeline.compose import compose_config
from pipeline.data.datamodule import EpisodicDataModule
from pipeline.data.pool import ImagePool, SplitPool
from pipeline.engine import keep_freed_memory
from pipeline.episode import Episode
from pipeline.learners.base import MetaLearner
from pipeline.sources import with_source


class RandomSource:
    """Noise in classes: what a step costs does not depend on the pictures.

    Args:
        shape: (C, H, W).
        classes: of train, val and test.
        images: of each class.
    """

    name = "random images"

    def __init__(self, shape: list[int], classes: list[int], images: int) -> None:
        self.shape, self.classes, self.images = shape, classes, images

    def load(self) -> SplitPool:
        """The same images at every call."""
        total = sum(self.classes)
        pixels = np.random.default_rng(0).integers(
            0, 256, (total * self.images, *self.shape), dtype=np.uint8
        )
        names = [f"class {i}" for i in range(total)]
        pool = ImagePool.from_arrays(pixels, np.repeat(np.arange(total), self.images), names)
        ends = np.cumsum([0, *self.classes])
        parts = zip(("train", "val", "test"), ends, ends[1:], strict=False)
        return SplitPool(pool, {split: names[a:b] for split, a, b in parts})


def parts(
    learner: str, source: dict[str, object], *overrides: str
) -> tuple[MetaLearner, EpisodicDataModule]:
    """Learner and data of `python -m pipeline.train learner=LEARNER OVERRIDES`, on a source."""
    cfg = compose_config("train", [f"learner={learner}", "data=digits", *overrides])
    cfg.data = with_source(cfg.data, OmegaConf.create(source))
    data = config.build_data(cfg.data)
    data.setup("fit")
    torch.manual_seed(0)
    return config.build_learner(cfg, data.image_shape).train(), data


def training(
    learner: str,
    channels: int,
    size: int,
    n_way: int,
    k_shot: int,
    n_query: int,
    tasks: int,
    *overrides: str,
) -> tuple[MetaLearner, Episode]:
    """A learner in training mode and a meta-batch as it meets it."""
    source = {
        "_target_": "benchmarks.ours.RandomSource",
        "shape": [channels, size, size],
        "classes": [2 * n_way, n_way, n_way],
        "images": 2 * (k_shot + n_query),
    }
    shape = [f"data.n_way={n_way}", f"data.k_shot={k_shot}", f"data.n_query={n_query}"]
    shape += [f"data.train_n_query={n_query}", f"data.meta_batch_size={tasks}"]
    built, data = parts(learner, source, *shape, "backbone.downsample=max_pool", *overrides)
    return built, data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)


def gradient_learner(
    learner: str, channels: int, size: int, k_shot: int, steps: int, tasks: int, n_query: int = 15
) -> tuple[MetaLearner, Episode]:
    """The pipeline's side of `peers.gradient_step`."""
    inner = ("learner.inner_lr=0.1", f"learner.inner_steps={steps}")
    return training(learner, channels, size, 5, k_shot, n_query, tasks, *inner)


def backward(learner: torch.nn.Module, objective: Callable[[], torch.Tensor], bf16: bool) -> None:
    """Gradients of one training step; as in Lightning, autocast covers the forward pass."""
    learner.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = objective()
    loss.backward()


def gradient_step(bf16: bool = False, **task: object) -> Callable[[], None]:
    """See `peers.gradient_step`."""
    keep_freed_memory()
    learner, batch = gradient_learner(**task)
    return lambda: backward(learner, lambda: learner.meta_loss(batch)[0], bf16)


def protonet_step(
    channels: int, size: int, n_way: int, k_shot: int, n_query: int, bf16: bool = False
) -> Callable[[], None]:
    """See `peers.protonet_step`."""
    keep_freed_memory()
    learner, batch = training("protonet", channels, size, n_way, k_shot, n_query, 1)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)

    def step() -> None:
        backward(learner, lambda: learner.meta_loss(batch)[0], bf16)
        optimizer.step()

    return step
