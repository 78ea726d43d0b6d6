"""What a learner makes of support images that it is adapted without. Floor 3."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.functional import count_ways
from pipeline.learners.base import MetaLearner
from pipeline.learners.embedding import EMBED_BATCH, EmbeddingLearner

ONE_BY_ONE = 100  # held-out images up to which each has a fold of its own
FOLDS = 10  # beyond


def folds(support_y: np.ndarray, seed: int = 0) -> np.ndarray:
    """The fold in which each image is held out, -1 for the only image of its class.

    Up to `ONE_BY_ONE` images are left out one by one, more in `FOLDS` folds in which every class
    has its share; no fold holds all images of a class.

    Args:
        support_y: (m,) classes.
        seed: shuffles the images of a class among folds.

    Returns:
        (m,) int64.
    """
    fold = np.full(len(support_y), -1)
    counts = np.bincount(support_y)
    several = np.flatnonzero(counts[support_y] > 1)
    if len(several) <= ONE_BY_ONE:
        fold[several] = np.arange(len(several))
        return fold
    order = np.random.default_rng(seed).permutation(several)
    by_class = order[np.argsort(support_y[order], kind="stable")]  # dealt out class after class
    fold[by_class] = np.arange(len(by_class)) % FOLDS
    return fold


@torch.inference_mode()
def held_out_logits(
    learner: MetaLearner,
    x: Tensor,
    support_y: Tensor,
    done: Callable[[int], None] = lambda n: None,
) -> tuple[Tensor, Tensor]:
    """Logits of each support image by the learner adapted to those outside of its fold.

    Args:
        learner: in evaluation mode.
        x: (m, C, H, W) float, as learners take images.
        support_y: (m,) classes.
        done: told after each fold how many images have been judged.

    Returns:
        Logits (h, n_way) and the indices (h,) of the images that could be held out.
    """
    n_way = count_ways(support_y)
    learner.check_ways(n_way)
    logits, held = [x.new_zeros(0, n_way)], [support_y[:0]]
    count = 0
    for query, given in _folds_judged(learner, x, support_y, n_way):
        logits.append(given)
        held.append(query)
        done(count := count + len(query))
    return torch.cat(logits), torch.cat(held)


def _folds_judged(
    learner: MetaLearner, x: Tensor, y: Tensor, n_way: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices and logits of each fold; images are embedded once where that is the same."""
    fold = torch.from_numpy(folds(y.cpu().numpy())).to(y.device)
    once = isinstance(learner, EmbeddingLearner) and learner.embeds_once
    if once:
        x = embedded(learner, x)
    for each in range(int(fold.max()) + 1):
        query, support = (fold == each).nonzero().flatten(), fold != each
        if once:
            yield query, learner.head(x[support], y[support], n_way)(x[query])
        else:
            yield query, learner.adapt(x[support], y[support])(x[query])


def embedded(learner: EmbeddingLearner, x: Tensor) -> Tensor:
    """Embeddings (m, d) of images of any number."""
    return torch.cat([learner.embed(part) for part in x.split(EMBED_BATCH)])
