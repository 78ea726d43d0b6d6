"""What a learner's network makes of images, whatever the task. Floor 3."""

import torch
from torch import Tensor

from pipeline.blocks import is_transductive
from pipeline.learners.base import MetaLearner
from pipeline.learners.embedding import EMBED_BATCH, EmbeddingLearner
from pipeline.learners.gradient import GradientLearner


@torch.no_grad()
def embeddings(learner: MetaLearner, x: Tensor) -> Tensor | None:
    """Embeddings of images: what a head sees of them, before anything is adapted to a task.

    Of an embedding learner `embed`, of a gradient learner the body of its network at theta. Where
    norms use the statistics of the batch at hand (a transductive network) that is all of x;
    `adapt` gives them the support set and the queries apart.

    Args:
        learner: in whatever mode; used in eval mode.
        x: (m, C, H, W), prepared as the learner takes them, on its device.

    Returns:
        (m, d), or None if the learner has no embeddings.
    """
    if isinstance(learner, EmbeddingLearner):
        embed = learner.embed
    elif isinstance(learner, GradientLearner):
        embed = learner.net.get_submodule("body")
    else:
        return None
    was_training = learner.training
    learner.eval()
    parts = [x] if is_transductive(learner) else x.split(EMBED_BATCH)
    z = torch.cat([embed(part).flatten(1) for part in parts])
    learner.train(was_training)
    return z
