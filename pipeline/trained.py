"""A run that was trained, ready to be used. Floor 4."""

from pipeline import checkpoints, config, sources
from pipeline.data.loaders import EpisodeLoaders
from pipeline.learners.base import MetaLearner
from pipeline.tracking.store import find_checkpoint


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
