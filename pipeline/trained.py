"""Learners ready to be used: of a run, of a file, or a network with weights. Floor 4."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from pipeline import checkpoints, config, sources
from pipeline.compose import compose_config
from pipeline.data.loaders import EpisodeLoaders
from pipeline.data.regression import RegressionDataModule
from pipeline.errors import UserError
from pipeline.learners.base import MetaLearner
from pipeline.learners.embedding import EmbeddingLearner
from pipeline.learners.with_head import WithHead
from pipeline.stored import stored_config
from pipeline.tracking.store import find_checkpoint

KEY = "learner"
DEFAULT_SIZE = 224  # px of photos, without a run
IMAGENET = ["data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]"]
"""Of its pixels, as torchvision's weights expect them."""


def open_run(run_id: str) -> tuple[MetaLearner, EpisodeLoaders]:
    """The learner with its best weights, in evaluation mode on the CPU, and its data.

    Raises:
        UserError: if there is no such run, or it has no checkpoint.
    """
    path = find_checkpoint(run_id, "best")
    cfg = checkpoints.restore_config(path)
    learner = config.build_learner(cfg, sources.image_shape(cfg.data), pretrained=False)
    checkpoints.load_weights(learner, path)
    return learner.eval(), config.build_data(cfg.data)


class Given(NamedTuple):
    """A learner that is to be adapted to photos.

    Attributes:
        learner: in evaluation mode.
        cfg: what `rebuild` makes the same learner of, without its weights.
        provenance: where it comes from; plain values.
    """

    learner: MetaLearner
    cfg: DictConfig
    provenance: dict[str, Any]

    @property
    def photo_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the photos that it takes."""
        return sources.image_shape(self.cfg.data)


def given_learner(cfg: DictConfig) -> Given:
    """The learner that a command names: a run or a checkpoint, or a network with weights.

    Args:
        cfg: keys run, checkpoint, image_size, head, and backbone, which is used without the
            others.

    Raises:
        UserError: if it is not to be had, or has real targets.
    """
    if cfg.run and cfg.checkpoint:
        raise UserError(f"run, checkpoint: found both, {cfg.run} and {cfg.checkpoint}; give one")
    head = cfg.get("head")
    if not (cfg.run or cfg.checkpoint):
        return _with_weights(cfg, head)
    if cfg.image_size is not None:
        raise UserError(f"image_size: found {cfg.image_size}; a run keeps that of its training")
    path = find_checkpoint(cfg.run, "best") if cfg.run else Path(cfg.checkpoint)
    trained = checkpoints.restore_config(path)
    if sources.data_module(trained.data) is RegressionDataModule:
        raise UserError(f"run: {cfg.run or path} has real targets; photos need one with classes")
    learner = config.build_learner(trained, sources.image_shape(trained.data), pretrained=False)
    step = checkpoints.load_weights(learner, path)
    if head:
        learner = under_head(learner, head)
        trained.head = head
    provenance = {"run": cfg.run or "", "checkpoint": path.name, "step": step}
    return Given(learner.eval(), trained, _described(learner, trained) | provenance)


def _with_weights(cfg: DictConfig, head: DictConfig | None) -> Given:
    """A frozen network under a head, nothing trained."""
    weights = cfg.backbone.get("weights")
    if weights is None:
        raise UserError("backbone.weights: found null; without a run the network needs weights")
    side = cfg.image_size or DEFAULT_SIZE
    fixed = ["learner=frozen", "data=image_folder", "data.root=photos"]
    if not config.standardises(cfg.backbone):
        fixed += IMAGENET
    whole = compose_config("train", [*fixed, f"data.image_shape=[3,{side},{side}]"])
    whole.backbone = cfg.backbone
    if head:
        whole.learner.head = head
    config.check(whole)
    learner = config.build_learner(whole, sources.image_shape(whole.data)).eval()
    return Given(learner, whole, _described(learner, whole) | {"weights": weights})


def _described(learner: MetaLearner, cfg: DictConfig) -> dict[str, Any]:
    network = config.backbone_label(cfg)
    return {"learner": learner.label, "backbone": network, "protocol": learner.protocol}


def as_plain(given: Given) -> dict[str, Any]:
    """All but the weights, as plain containers."""
    config = OmegaConf.to_container(given.cfg, resolve=True)
    return {"provenance": given.provenance, "config": config}


def from_plain(plain: dict[str, Any], path: Path) -> Given:
    """What `as_plain` was given, weights to follow; found in the file `path`.

    Raises:
        UserError: see `stored.stored_config`.
    """
    cfg = stored_config(plain["config"], path)
    return Given(rebuild(cfg), cfg, plain["provenance"])


def save_learner(given: Given, path: Path) -> None:
    """Write one file of tensors and plain containers; `load_learner` reads it."""
    torch.save({KEY: as_plain(given), "state_dict": given.learner.state_dict()}, path)


def load_learner(path: Path) -> Given:
    """Read what `save_learner` wrote. Nothing in the file is executed.

    Raises:
        UserError: if it is no such file.
    """
    file = checkpoints.read_file(path, KEY, "learner")
    with checkpoints.whole(path, "learner"):
        given = from_plain(file[KEY], path)
        given.learner.load_state_dict(file["state_dict"])
    return given


def rebuild(cfg: DictConfig) -> MetaLearner:
    """The learner of `Given.cfg`, weights to follow."""
    learner = config.build_learner(cfg, sources.image_shape(cfg.data), pretrained=False)
    return under_head(learner, cfg.head) if cfg.get("head") else learner.eval()


def under_head(
    learner: MetaLearner,
    head: DictConfig,
    base_mean: Callable[[EmbeddingLearner], Tensor] | None = None,
    suffix: str = "",
) -> WithHead:
    """A trained learner's network under a head.

    Args:
        learner: with embeddings.
        head: a checked `head` node.
        base_mean: measures the base mean if the head needs it; None if that cannot be done.
        suffix: added to the head's name.

    Raises:
        UserError: if the learner has no embeddings, or the head needs what is not there.
    """
    if not isinstance(learner, EmbeddingLearner):
        raise UserError(
            f"head: works on embeddings, but the run is of {learner.label}, which has none; an "
            "embedding learner (protonet) has"
        )
    built, centre = config.build_head(head), None
    if built.features == "CL2N":
        if base_mean is None:
            raise UserError(
                "head.features: CL2N needs the mean embedding of training images, which are not "
                "at hand; allowed are UN, L2N"
            )
        centre = base_mean(learner)
    return WithHead(learner, built, centre, suffix).eval()
