"""Gradient descent on the weights of a head, in operations that vmap stacks. Floor 1."""

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
