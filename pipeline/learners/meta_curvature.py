"""Meta-Curvature. Park, Oliva 2019, https://arxiv.org/abs/1902.03356."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.annotations import NonNegativeInt, PositiveFloat, Ways
from pipeline.engine import Engine
from pipeline.functional import Loss, Params
from pipeline.inner import PLAIN_DESCENT, Rule, descend
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.gradient import Adapted, GradientLearner, below, parameter_dict

AXES = ("out", "in", "filter")
"""What the gradient of a weight, (out, in) or (out, in, height * width), is multiplied along."""


class MetaCurvature(GradientLearner):
    """MAML whose inner gradients pass through learned matrices, one along each axis of a weight.

    MC2 of section 3: the gradient of a convolution, as a tensor (out, in, height * width), becomes
    its mode products with M_o, M_i and M_f, that of a linear layer those with M_o and M_i; they
    stand for a Kronecker-factored preconditioner of the whole weight. What has one axis (biases,
    norms) is scaled element by element. All start at the identity, where this is MAML.

    Args:
        inner_lr: rate of the transformed gradients.
        first_order: leave out second derivatives.
        inner_rule: what turns a transformed gradient into a step; the paper has plain descent.
        The rest: see `GradientLearner`.
    """

    label = "Meta-Curvature"

    def __init__(
        self,
        backbone: nn.Module,
        n_way: Ways,
        inner_lr: PositiveFloat,
        inner_steps: NonNegativeInt,
        eval_inner_steps: NonNegativeInt,
        first_order: bool,
        adapted: Adapted,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        engine: Engine = "auto",
        loss: Loss = "cross_entropy",
        inner_rule: Rule = PLAIN_DESCENT,
    ) -> None:
        super().__init__(
            backbone, n_way, inner_steps, eval_inner_steps, adapted, optimizer, scheduler, engine,
            loss,
        )  # fmt: skip
        self.inner_lr, self.first_order, self.inner_rule = inner_lr, first_order, inner_rule
        identity: Params = {}
        for name, value in self.bind(self.theta()).phi.items():
            if value.dim() == 1:
                identity[f"{name}.scale"] = torch.ones_like(value)
                continue
            shape = value.shape if value.dim() == 2 else value.flatten(2).shape
            for axis, size in zip(AXES, shape, strict=False):
                identity[f"{name}.{axis}"] = torch.eye(size, dtype=value.dtype)
        self.curvature = parameter_dict(identity)

    def inner_loop(
        self, loss: Callable[[Params], Tensor], phi: Params, meta: Params, steps: int
    ) -> Params:
        """`steps` steps along the transformed gradients of the support loss."""
        curvature = below(meta, "curvature")

        def transform(grads: Params) -> Params:
            return {k: transformed(g, below(curvature, k)) for k, g in grads.items()}

        return descend(
            loss, phi, self.inner_rule, self.inner_lr, steps, self.first_order, transform
        )


def transformed(grad: Tensor, curvature: Params) -> Tensor:
    """Mode products of a gradient with its matrices, or its product with its scale.

    Args:
        grad: (out, in, height, width), (out, in) or (n,).
        curvature: square matrices "out", "in" and "filter" (height * width rows), or "scale" (n,).

    Returns:
        The shape of grad.
    """
    if "scale" in curvature:
        return grad * curvature["scale"]
    if grad.dim() == 2:
        return curvature["out"] @ grad @ curvature["in"].T
    flat = curvature["in"] @ (grad.flatten(2) @ curvature["filter"].T)  # (out, in, height*width)
    return (curvature["out"] @ flat.flatten(1)).reshape(grad.shape)
