"""A run that was trained, ready to be used. Floor 4."""

from pipeline import checkpoints, config
from pipeline.data.datamodule import EpisodicDataModule
from pipeline.learners.base import MetaLearner
from pipeline.tracking.store import find_checkpoint


def open_run(run_id: str) -> tuple[MetaLearner, EpisodicDataModule]:
    """The learner with its best weights, in evaluation mode on the CPU, and its data.

    Raises:
        UserError: if there is no such run, or it has no checkpoint.
    """
    path = find_checkpoint(run_id, "best")
    cfg = checkpoints.restore_config(path)
    channels, height, width = cfg.data.image_shape
    learner = config.build_learner(cfg, (channels, height, width), pretrained=False)
    checkpoints.load_weights(learner, path)
    return learner.eval(), config.build_data(cfg.data)
