"""`python -m pipeline.evaluate`: score a trained run on fixed test episodes. Floor 5."""

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.train import quieten

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.learners.base import MetaLearner
    from pipeline.learners.embedding import EmbeddingLearner
    from pipeline.learners.with_head import WithHead


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Score the best checkpoint of a run, or a checkpoint file, and write the result to the run.

    Returns:
        `run_id` (None for a bare checkpoint) and the test metrics, accuracies in 0..1.

    Raises:
        UserError: for bad input.
    """
    if bool(cfg.run) == bool(cfg.checkpoint):
        raise UserError(
            f"run, checkpoint: found run={cfg.run}, checkpoint={cfg.checkpoint}; give one of them"
        )
    quieten()
    import torch

    from pipeline import checkpoints, config, reporting, sources
    from pipeline.engine import keep_freed_memory
    from pipeline.scoreboard import make_test_sets, other_sources
    from pipeline.seen import refuse_seen
    from pipeline.tracking.run import NoRun, existing_run
    from pipeline.tracking.store import find_checkpoint

    config.check_root(cfg, "evaluate")
    path = find_checkpoint(cfg.run, "best") if cfg.run else Path(cfg.checkpoint)
    trained = checkpoints.restore_config(path)
    image_shape = sources.image_shape(trained.data)
    source = cfg.data if "data" in cfg else trained.data
    changes = {k: cfg[k] for k in ("n_way", "n_query") if cfg[k] is not None}
    if cfg.episodes is not None:
        changes["test_episodes"] = cfg.episodes
    further = cfg.also_test
    if further is None:
        further = [] if "data" in cfg else trained.also_test
    others = other_sources(further or [])
    shots = trained.test_k_shot if cfg.k_shot is None else cfg.k_shot
    shots = [shots] if isinstance(shots, int) else list(shots)

    learner = config.build_learner(trained, image_shape, pretrained=False)
    keep_freed_memory()
    step = checkpoints.load_weights(learner, path)
    learner.to("cuda" if torch.cuda.is_available() else "cpu")
    scored_by = ""
    if "head" in cfg:
        learner = _under_head(learner, cfg, trained.data, overrides)
        scored_by = learner.short_label
        changes |= {"train_n_way": cfg.n_way} if cfg.n_way else {}  # the learner's own head is off
    if cfg.n_way is not None:
        try:
            learner.check_ways(cfg.n_way)
        except ValueError as error:
            raise UserError(str(error)) from error
    try:
        trained.data = sources.with_source(trained.data, source, image_shape, **changes)
    except UserError as error:
        raise UserError(f"data: {error}") from error
    config.check(trained)
    data = config.build_data(trained.data)
    sets = [s._replace(scored_by=scored_by) for s in make_test_sets(trained, data, others, shots)]
    refuse_seen(checkpoints.stored_seen(path), sets)
    csv = f"evaluations/{datetime.now(UTC):%Y%m%dT%H%M%SZ}.csv"
    network = config.backbone_label(trained)
    with existing_run(cfg.run) if cfg.run else nullcontext(NoRun()) as tracked:
        return reporting.test_and_report(
            tracked,
            learner,
            sets,
            network,
            trained.published,
            step,
            main=None,
            csv=csv,
            inside=cfg.inside_episodes if cfg.inside and cfg.run else 0,
        )


def _under_head(
    learner: "MetaLearner", cfg: DictConfig, trained_on: DictConfig, overrides: Sequence[str]
) -> "WithHead":
    """The trained network under the head asked for, named after it and what was changed of it."""
    from pipeline import config
    from pipeline.data.datamodule import EpisodicDataModule
    from pipeline.learners.embedding import base_mean
    from pipeline.trained import under_head

    keys = [o.lstrip("+") for o in overrides]
    changed = ", ".join(k.removeprefix("head.") for k in keys if k.startswith("head."))

    def centre(learner: "EmbeddingLearner") -> "Tensor":
        images = config.build_data(trained_on)
        assert isinstance(images, EpisodicDataModule)  # an embedding learner sees no other
        return base_mean(learner, images)

    return under_head(learner, cfg.head, centre, f" ({changed})" if changed else "")


if __name__ == "__main__":
    main("evaluate", run)
