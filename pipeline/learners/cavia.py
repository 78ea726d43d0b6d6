"""CAVIA. Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson 2019, https://arxiv.org/abs/1810.03642."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.annotations import NonNegativeInt, PositiveFloat, PositiveInt, Ways
from pipeline.backbones import MLP, Conv4
from pipeline.blocks import ConvBlock
from pipeline.engine import Engine
from pipeline.errors import UserError
from pipeline.functional import Loss, Params
from pipeline.inner import PLAIN_DESCENT, Rule, descend
from pipeline.learners.base import OptimizerFactory, SchedulerFactory
from pipeline.learners.gradient import Bound, GradientLearner, below

Modulation = Literal["scale_shift", "shift"]


class Cavia(GradientLearner):
    """Adapt a few context parameters to a task, starting from zero, and no weight of the network.

    The context enters at one layer, before its ReLU: the third convolution of Conv4 (section 5.3)
    or the first hidden layer of an MLP. What lies below is the same in all inner steps and is
    computed once.

    Args:
        context_size: number of context parameters.
        modulation: "scale_shift" of channels, each linear in the context (FiLM; the paper's CNN),
            or "shift", which is what a context concatenated to the input of the layer amounts to
            (the paper's regression).
        inner_lr: alpha of eq. 5.
        first_order: leave out second derivatives.
        inner_rule: what turns an inner gradient into a step; the paper has plain descent.
        The rest: see `GradientLearner`.
    """

    label = "CAVIA"

    def __init__(
        self,
        backbone: nn.Module,
        n_way: Ways,
        context_size: PositiveInt,
        modulation: Modulation,
        inner_lr: PositiveFloat,
        inner_steps: PositiveInt,
        eval_inner_steps: NonNegativeInt,
        first_order: bool,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        engine: Engine = "auto",
        loss: Loss = "cross_entropy",
        inner_rule: Rule = PLAIN_DESCENT,
    ) -> None:
        super().__init__(
            backbone, n_way, inner_steps, eval_inner_steps, "head", optimizer, scheduler, engine,
            loss,
        )  # fmt: skip
        self.inner_lr, self.first_order, self.inner_rule = inner_lr, first_order, inner_rule
        lower, upper, channels = cut(backbone)
        upper = [nn.ReLU(), *upper, nn.Flatten(), self.net.get_submodule("head")]
        context = Context(context_size, channels, modulation)
        head = nn.Sequential(OrderedDict(context=context, rest=nn.Sequential(*upper)))
        self.net = nn.Sequential(OrderedDict(body=lower, head=head))

    def bind(self, theta: Params) -> Bound:
        """See `GradientLearner.bind`; phi is the context alone.

        It is zero as a function of theta: `gradient` is differentiable again where its point is.
        """
        net, head = below(theta, "net"), self.net.get_submodule("head")
        fixed = below(net, "head")
        return Bound(
            {"context.context": 0 * fixed["context.shift.weight"][0]},
            {},
            self._at("body", below(net, "body")),
            lambda p, z: functional_call(head, fixed | p, (z,)),
        )

    def inner_loop(
        self, loss: Callable[[Params], Tensor], phi: Params, meta: Params, steps: int
    ) -> Params:
        """`steps` steps of gradient descent on the support loss, of the context."""
        return descend(loss, phi, self.inner_rule, self.inner_lr, steps, self.first_order)


class Context(nn.Module):
    """Scales and shifts channels by linear functions of a context.

    Where the context is zero the scale is 1 and the shift 0 before training; the authors' code
    starts these two at random, and the weights as here.

    Attributes:
        context: (size,), zero; what a task adapts is given in its place.
    """

    context: Tensor

    def __init__(self, size: int, channels: int, modulation: Modulation) -> None:
        super().__init__()
        self.shift = nn.Linear(size, channels)
        self.scale = nn.Linear(size, channels) if modulation == "scale_shift" else None
        for layer, start in ((self.shift, 0.0), (self.scale, 1.0)):
            if layer is not None:
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
                nn.init.constant_(layer.bias, start)
        self.register_buffer("context", torch.zeros(size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(m, channels, ...) -> the same shape."""
        shape = [1, -1, *[1] * (x.dim() - 2)]
        if self.scale is not None:
            x = x * self.scale(self.context).view(shape)
        return x + self.shift(self.context).view(shape)


class BeforeReLU(nn.Module):
    """A convolution block without its ReLU."""

    def __init__(self, block: ConvBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(m, C, H, W) -> (m, width, H/2, W/2)."""
        return self.block.before_relu(x)


def cut(backbone: nn.Module) -> tuple[nn.Module, list[nn.Module], int]:
    """What comes before the ReLU where the context enters, what after it, and the channels there.

    Raises:
        UserError: if it is neither a Conv4 nor an MLP.
    """
    if isinstance(backbone, Conv4):
        first, second, third, fourth = backbone.blocks
        assert isinstance(third, ConvBlock)
        return nn.Sequential(first, second, BeforeReLU(third)), [fourth], third.conv.out_channels
    if isinstance(backbone, MLP):
        first, *rest = backbone.layers
        assert isinstance(first, nn.Sequential)
        linear, norm = first[0], first[1]
        assert isinstance(linear, nn.Linear)
        return nn.Sequential(nn.Flatten(), linear, norm), rest, linear.out_features
    raise UserError(f"backbone: found {type(backbone).__name__}; CAVIA takes conv4 or mlp")
