"""Gradient descent on the weights of a head, in operations that vmap stacks. Floor 1."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def adam(gradient: Callable[[Tensor], Tensor], w: Tensor, lr: float, steps: int) -> Tensor:
    """Adam (Kingma, Ba 2015, algorithm 1) from w; `torch.optim.Adam` cannot be stacked by vmap.

    Args:
        gradient: of what is descended, at the weights it is given; they are written over later.
        w: (n_way, d), left as it is.
        lr: rate; the other constants are those of the paper.
        steps: how many.
    """
    w = w.clone()
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, steps + 1):
        g = gradient(w)
        mean.mul_(0.9).add_(g, alpha=0.1)
        square.mul_(0.999).add_(g.mul_(g), alpha=0.001)
        spread = square.sqrt().mul_((1 - 0.999**t) ** -0.5).add_(1e-8)
        w.sub_(mean / spread, alpha=lr / (1 - 0.9**t))
    return w


def by_logits(log_p: Tensor, y: Tensor, fit: float, marginal: float, conditional: float) -> Tensor:
    """Gradient of fit CE - marginal H(Y) + conditional H(Y|X) with respect to the logits.

    Cross-entropy of the support set, entropy of the mean prediction of the queries, and mean
    entropy of their predictions; in closed form, which takes a fraction of autograd's time.

    Args:
        log_p: (n_way, m+q) logarithms of the predictions, the support set first.
        y: (n_way, m) its labels as zeros and ones.
        fit, marginal, conditional: weights.

    Returns:
        (n_way, m+q).
    """
    m, q = y.shape[1], log_p.shape[1] - y.shape[1]
    p, log_of_query = log_p.exp(), log_p[:, m:]  # (n_way, q); logarithms stay finite
    of_query, log_sum = p[:, m:], log_of_query.logsumexp(1, keepdim=True)
    gain = marginal * (log_sum - math.log(q)) - conditional * log_of_query
    gain = of_query * (gain - (of_query * gain).sum(0)) / q
    return torch.cat([fit / m * (p[:, :m] - y), gain], dim=1)
