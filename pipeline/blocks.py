"""What networks are made of: norms, and the convolution block of Conv4. Floor 1.

`norm` is explicit everywhere:
    batch        running statistics: inductive
    batch_stats  statistics of the batch at hand: transductive, what the MAML papers did
    group        group norm in up to 8 groups of 4 channels or more: inductive, no statistics kept
    none         no norm
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.functional import plain_autograd

Norm = Literal["batch", "batch_stats", "group", "none"]
Downsample = Literal["max_pool", "stride"]
Halving = Downsample | Literal["none"]


class BatchStatsNorm(nn.Module):
    """Batch norm by the statistics of the batch at hand, in training and evaluation alike.

    Written from var_mean and rsqrt, which is exact in every mode: the gradient of a vmap through
    torch's fused batch norm is wrong in second order (it disagrees with finite differences). The
    fused one, 1.5 times faster on a CPU, is right without vmap and where gradients are taken inside
    of vmap, as `GradientLearner` takes them: such a caller sets `fused`.

    Attributes:
        statistics: (2, channels), mean and variance to use in place of the batch's; None or empty
            for the batch's.
    """

    fused = False
    statistics: Tensor | None

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps
        self.register_buffer("statistics", None, persistent=False)

    def given(self) -> Tensor | None:
        """`statistics`, if there are any."""
        return self.statistics if self.statistics is not None and self.statistics.numel() else None

    def forward(self, x: Tensor) -> Tensor:
        """(m, C, ...) -> the same shape."""
        several = x.numel() > x.shape[1]  # torch refuses one value a channel
        shape = [1, -1, *[1] * (x.dim() - 2)]
        if (given := self.given()) is not None:
            mean, var = (s.view(shape) for s in given)
        elif several and (self.fused or plain_autograd()):
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        else:
            dims = [0, *range(2, x.dim())]
            var, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
        scale = self.weight.view(shape) * torch.rsqrt(var + self.eps)
        return x * scale + (self.bias.view(shape) - mean * scale)


def make_norm(norm: Norm, channels: int, dims: int = 2) -> nn.Module:
    """A norm layer for (m, channels, ...) with `dims` spatial dimensions (0 or 2)."""
    match norm:
        case "batch":
            return nn.BatchNorm2d(channels) if dims else nn.BatchNorm1d(channels)
        case "batch_stats":
            return BatchStatsNorm(channels)
        case "group":
            most = min(8, max(1, channels // 4))  # a group of one value would be its bias
            return nn.GroupNorm(math.gcd(channels, most), channels)
        case "none":
            return nn.Identity()


def is_transductive(module: nn.Module) -> bool:
    """Whether an output depends on the other images of its batch in evaluation."""
    return any(isinstance(part, BatchStatsNorm) for part in module.modules())


class ConvBlock(nn.Module):
    """3x3 convolution, norm, halving by max-pool or stride or none, ReLU.

    Pooling stands before ReLU, which gives the same numbers from a quarter of the elements. A
    convolution before a norm over the batch has no bias, which that norm would take away.
    """

    def __init__(self, channels: int, width: int, norm: Norm, downsample: Halving) -> None:
        super().__init__()
        self.stride = 2 if downsample == "stride" else 1
        self.pool = 2 if downsample == "max_pool" else 1
        bias = norm not in ("batch", "batch_stats")
        self.conv = nn.Conv2d(channels, width, 3, self.stride, padding=1, bias=bias)
        self.norm = make_norm(norm, width)

    def forward(self, x: Tensor) -> Tensor:
        """(m, C, H, W) -> (m, width, H/2, W/2); max-pool rounds down, stride rounds up."""
        return torch.relu(self.before_relu(x))

    def before_relu(self, x: Tensor) -> Tensor:
        """`forward` without its last step."""
        y = self.norm(_convolve(x, self.conv.weight, self.conv.bias, self.stride))
        return y if self.pool == 1 else F.max_pool2d(y, self.pool)


class FirstBlock(ConvBlock):
    """The same function where images have few channels and the norm is over the batch.

    Half of Conv4's elements are the output of its first convolution. That output is linear in the
    3x3 patches of the images: its mean is W m and its variance diag(W S W'), with m and S the mean
    and covariance of the patches (9C numbers, which no parameter enters). So the norm is folded
    into the weights and never passes over the output, forwards or backwards.
    """

    norm: nn.BatchNorm2d | BatchStatsNorm

    def before_relu(self, x: Tensor) -> Tensor:
        """(m, C, H, W) -> (m, width, H/2, W/2)."""
        norm = self.norm
        mean, var = self._moments(x)  # (width,) each, of the convolution's output
        scale = norm.weight * torch.rsqrt(var + norm.eps)
        y = _convolve(x, self.conv.weight * scale.view(-1, 1, 1, 1), None, self.stride)
        y = y if self.pool == 1 else F.max_pool2d(y, self.pool)
        return y + (norm.bias - mean * scale).to(y.dtype).view(-1, 1, 1)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.norm
        if isinstance(norm, nn.BatchNorm2d) and not norm.training:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            return norm.running_mean, norm.running_var
        if isinstance(norm, BatchStatsNorm) and (given := norm.given()) is not None:
            return given[0], given[1]
        with torch.autocast(x.device.type, enabled=False):  # variances cancel in half precision
            weight = self.conv.weight.flatten(1)  # (width, 9C)
            patches = F.unfold(x, 3, padding=1, stride=self.stride)  # (m, 9C, H'W')
            count = patches.shape[0] * patches.shape[2]
            centre = patches.mean((0, 2))  # (9C,)
            patches = patches - centre.unsqueeze(1)
            covariance = torch.bmm(patches, patches.mT).sum(0) / count  # (9C, 9C)
            mean, var = weight @ centre, ((weight @ covariance) * weight).sum(1)
        if isinstance(norm, nn.BatchNorm2d):
            _keep_running(norm, mean.detach(), var.detach() * (count / (count - 1)))
        return mean, var


def _keep_running(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
    """What torch's batch norm does in training; var is the unbiased one."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked += 1
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(var, norm.momentum)


def conv_block(
    channels: int, width: int, norm: Norm, downsample: Halving, first: bool
) -> ConvBlock:
    """The block that computes fastest."""
    few = first and channels <= 4 and norm in ("batch", "batch_stats")
    return (FirstBlock if few else ConvBlock)(channels, width, norm, downsample)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """3x3 convolution with padding 1; channels last in memory."""
    if x.shape[1] > 1 or x.device.type != "cpu":
        return F.conv2d(x, weight, bias, stride, padding=1)
    # One input channel: a matrix product, as oneDNN is slow at it and forgets the memory format.
    height, width = x.shape[2:]
    patches = F.unfold(x, 3, padding=1, stride=stride)  # (m, 9, H'W')
    y = patches.mT @ weight.flatten(1).T.contiguous()  # (m, H'W', C')
    y = y if bias is None else y + bias.to(y.dtype)
    return y.unflatten(1, (-(-height // stride), -(-width // stride))).permute(0, 3, 1, 2)
