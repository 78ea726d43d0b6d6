"""The LSTM meta-learner. Ravi, Larochelle 2017, https://openreview.net/forum?id=rJY0-Kcll."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.annotations import NonNegativeInt, PositiveInt, Ways
from pipeline.engine import Engine
from pipeline.functional import Loss, Params, gradient
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.gradient import GradientLearner, below

P = 10  # of `preprocess`, as in the paper


class LstmLearner(GradientLearner):
    """Learn the optimiser as well as where it starts: an LSTM whose cell is the network.

    Each parameter is the cell c of a small LSTM of its own, all with the same weights:
    c_t = f_t * c_(t-1) - i_t * dL/dc (eq. 2). The forget gate f decays it and the input gate i is
    its rate; both see the gradient and the loss, through a first, ordinary LSTM, and the parameter
    and their own last value. The initial cell is where `net` starts. First order: losses and
    gradients are constants (section 3.3.1). Every step sees the whole support set, where the paper
    draws mini-batches of it.

    Args:
        hidden: numbers in the state of the first LSTM; the authors' code has 20.
        The rest: see `GradientLearner`. Gates know how many steps they were trained for.
    """

    def __init__(
        self,
        backbone: nn.Module,
        n_way: Ways,
        hidden: PositiveInt,
        inner_steps: NonNegativeInt,
        eval_inner_steps: NonNegativeInt,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        engine: Engine = "auto",
        loss: Loss = "cross_entropy",
    ) -> None:
        super().__init__(
            backbone, n_way, inner_steps, eval_inner_steps, "all", optimizer, scheduler, engine,
            loss,
        )  # fmt: skip
        self.lstm = nn.LSTMCell(4, hidden)
        self.forget_gate, self.input_gate = nn.Linear(hidden + 2, 1), nn.Linear(hidden + 2, 1)
        for part in (self.lstm, self.forget_gate, self.input_gate):
            for parameter in part.parameters():
                nn.init.uniform_(parameter, -0.01, 0.01)
        # Section 3.3.2: at first gradient descent, at a rate near 0.01
        nn.init.uniform_(self.forget_gate.bias, 4.0, 6.0)
        nn.init.uniform_(self.input_gate.bias, -5.0, -4.0)

    @property
    def label(self) -> str:
        """As the paper writes it."""
        return "Meta-Learner LSTM"

    def inner_loop(
        self, loss: Callable[[Params], Tensor], phi: Params, meta: Params, steps: int
    ) -> Params:
        """`steps` steps of the LSTM on the support loss."""

        def twice(p: Params) -> tuple[Tensor, Tensor]:
            value = loss(p)
            return value, value

        lstm = below(meta, "lstm")
        cell = _flat(phi)  # (n, 1), the n numbers in phi
        h = c = cell.new_zeros(len(cell), lstm["weight_hh"].shape[1])
        forget = inputs = torch.zeros_like(cell)
        for _ in range(steps):
            grads, value = gradient(twice, {k: v.detach() for k, v in phi.items()})
            grad, value = _flat(grads).detach(), value.detach().expand(len(cell), 1)
            h, c = lstm_cell(lstm, torch.cat([preprocess(grad), preprocess(value)], 1), h, c)
            forget = _gate(below(meta, "forget_gate"), h, cell, forget)
            inputs = _gate(below(meta, "input_gate"), h, cell, inputs)
            cell = forget * cell - inputs * grad
            phi = _unflat(cell, phi)
        return phi


def preprocess(x: Tensor) -> Tensor:
    """Magnitude and sign of numbers of any scale: (n, 1) -> (n, 2).

    (log|x| / p, sign x) where |x| >= e^-p, else (-1, e^p x). Section 3.2, after Andrychowicz et al.
    2016, appendix A.
    """
    large = x.abs() >= math.exp(-P)
    first = torch.where(large, torch.where(large, x, 1).abs().log() / P, -1)
    return torch.cat([first, torch.where(large, x.sign(), math.exp(P) * x)], 1)


def lstm_cell(params: Params, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of torch.nn.LSTMCell, whose fused kernel on CUDA cannot be stacked by vmap.

    Args:
        params: by the names of torch.nn.LSTMCell.
        x: (n, inputs).
        h, c: (n, hidden) each.

    Returns:
        The next h and c.
    """
    gates = F.linear(x, params["weight_ih"], params["bias_ih"])
    gates = gates + F.linear(h, params["weight_hh"], params["bias_hh"])
    i, f, g, o = gates.chunk(4, 1)  # (n, hidden) each
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gate(params: Params, h: Tensor, cell: Tensor, last: Tensor) -> Tensor:
    """Section 3.1's forget or input gate, (n, 1) in 0..1, with its value in the last step."""
    seen = torch.cat([h, cell, last], 1)  # (n, hidden + 2)
    return F.linear(seen, params["weight"], params["bias"]).sigmoid()


def _flat(params: Params) -> Tensor:
    """All numbers in a column, (n, 1)."""
    return torch.cat([v.reshape(-1, 1) for v in params.values()])


def _unflat(column: Tensor, like: Params) -> Params:
    """Parameters of these shapes from what `_flat` made of others."""
    parts = column.split([v.numel() for v in like.values()])
    return {k: p.reshape(v.shape) for (k, v), p in zip(like.items(), parts, strict=True)}
