"""Backbones: plain modules from images (m, C, H, W) to embeddings (m, out_dim). Floor 1."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from pipeline.annotations import PositiveInt, Probability
from pipeline.blocks import Downsample, Halving, Norm, conv_block, make_norm
from pipeline.errors import UserError
from pipeline.pretrained import WEIGHT_FILES, load_file


def out_dim(backbone: nn.Module) -> int:
    """Length of the embeddings of a backbone, which every one states."""
    dim = backbone.out_dim
    assert isinstance(dim, int), "a backbone states its out_dim as a number"
    return dim


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, norm, ReLU and a halving, as in Vinyals et al. 2016.

    The halving is a max-pool (MatchingNet, ProtoNet, MAML on miniImageNet) or the stride of the
    convolution (MAML on Omniglot; Finn et al. 2017, App. A.1). The output is flattened; `out_shape`
    is that of its maps.

    Args:
        halvings: that many blocks halve, from the first on; RelationNet's embedding has 2.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        width: PositiveInt,
        norm: Norm,
        downsample: Downsample,
        halvings: Annotated[int, Ge(0), Le(4)] = 4,
    ) -> None:
        super().__init__()
        if downsample == "max_pool" and image_size < 2**halvings:
            raise UserError(
                f"backbone.downsample: {halvings} max-pools need images of {2**halvings} px or "
                f"more, found {image_size}; use backbone.downsample=stride"
            )
        blocks: list[nn.Module] = []
        channels, size = in_channels, image_size
        for i in range(4):
            halving: Halving = downsample if i < halvings else "none"
            blocks.append(conv_block(channels, width, norm, halving, first=i == 0))
            channels = width
            if i < halvings:
                size = (size + 1) // 2 if downsample == "stride" else size // 2
        self.blocks = nn.Sequential(*blocks)
        self.out_shape = (width, size, size)
        self.out_dim = width * size * size
        self.to(memory_format=torch.channels_last)  # 1.5 times faster on a CPU

    def forward(self, x: Tensor) -> Tensor:
        """(m, C, H, W) -> (m, out_dim)."""
        return self.blocks(x).flatten(1)


class MLP(nn.Module):
    """Fully connected layers with norm and ReLU; Finn et al. 2017, App. A.1 has 256-128-64-64."""

    def __init__(
        self, in_channels: int, image_size: int, widths: list[PositiveInt], norm: Norm
    ) -> None:
        super().__init__()
        sizes = [in_channels * image_size**2, *widths]
        self.layers = nn.Sequential(
            *[
                nn.Sequential(nn.Linear(a, b), make_norm(norm, b, dims=0), nn.ReLU())
                for a, b in pairwise(sizes)
            ]
        )
        self.out_dim = sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(m, C, H, W) -> (m, out_dim)."""
        return self.layers(x.flatten(1))


class DropBlock(nn.Module):
    """Drops square regions of feature maps in training. Ghiasi, Lin, Le 2018, algorithm 1.

    https://arxiv.org/abs/1810.12890. gamma is their eq. 1; the kept activations are rescaled.
    """

    def __init__(self, probability: float, block_size: int) -> None:
        super().__init__()
        self.probability, self.block_size = probability, block_size

    def forward(self, x: Tensor) -> Tensor:
        """(m, C, H, W) -> the same shape."""
        if not self.training or not self.probability:
            return x
        h, w = x.shape[2:]
        b = min(self.block_size, h, w)
        gamma = self.probability * h * w / b**2 / ((h - b + 1) * (w - b + 1))
        seeds = torch.rand(*x.shape[:2], h - b + 1, w - b + 1, device=x.device) < gamma
        dropped = F.max_pool2d(F.pad(seeds.to(x.dtype), (b - 1,) * 4), b, stride=1)
        keep = 1 - dropped  # (m, C, H, W)
        return x * keep * (keep.numel() / keep.sum().clamp(min=1))


class ResNet12(nn.Module):
    """Four residual blocks of three convolutions, as in TADAM and MetaOptNet (Lee et al. 2019).

    https://arxiv.org/abs/1904.03758, section 4.1: widths 64-160-320-640, leaky ReLU 0.1, DropBlock
    in the last two blocks and dropout in the first two. The output is the spatial mean.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt],
        norm: Norm,
        drop: Probability,
        block_size: PositiveInt,
    ) -> None:
        super().__init__()
        drops = [nn.Dropout(drop), nn.Dropout(drop), *(DropBlock(drop, block_size) for _ in "34")]
        sizes = [in_channels, *widths]
        self.blocks = nn.Sequential(
            *[
                _ResidualBlock(a, b, norm, d)
                for a, b, d in zip(sizes, sizes[1:], drops, strict=False)
            ]
        )
        self.out_dim = sizes[-1]
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """(m, C, H, W) -> (m, out_dim)."""
        return self.blocks(x).mean((2, 3))


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, width: int, norm: Norm, drop: nn.Module) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [
                nn.Conv2d(channels if i == 0 else width, width, 3, padding=1, bias=False),
                make_norm(norm, width),
                nn.LeakyReLU(0.1),
            ]
        self.body = nn.Sequential(*layers[:-1])  # the last activation follows the sum
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), make_norm(norm, width)
        )
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.body(x) + self.shortcut(x), 0.1)
        return self.drop(F.max_pool2d(x, 2, ceil_mode=True))


class TorchvisionBackbone(nn.Module):
    """Any classifier of `torchvision.models` without its last linear layer.

    Args:
        name: as `torchvision.models.list_models()` spells it.
        weights: "DEFAULT", another weights name of that model (both downloaded by torchvision),
            the path of a .pth or .safetensors file, or null for random weights.
        norm: "batch" keeps the model's batch norms, another value replaces them.
    """

    def __init__(self, in_channels: int, name: str, weights: str | None, norm: Norm) -> None:
        super().__init__()
        import torchvision

        allowed = torchvision.models.list_models(module=torchvision.models)
        if name not in allowed:
            raise UserError(f"backbone.name: no model {name!r}; allowed are {', '.join(allowed)}")
        if in_channels != 3:
            raise UserError(
                f"backbone={name}: torchvision models take RGB, the data has {in_channels} "
                "channel(s); set data.image_shape=[3,H,W]"
            )
        file = Path(weights) if weights and Path(weights).suffix in WEIGHT_FILES else None
        try:
            self.model = torchvision.models.get_model(name, weights=None if file else weights)
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"backbone.weights: {weights!r} of {name}: {error}") from error
        for head in ("AuxLogits", "aux1", "aux2"):  # for training a classifier of ImageNet only
            if hasattr(self.model, head):
                setattr(self.model, head, None)
        layers = [(p, m) for p, m in self.model.named_modules() if _outputs(m)]
        path, last = layers[-1]
        if _outputs(last) != 1000:
            raise UserError(f"backbone.name: {name} does not end in a linear classifier")
        self.model.set_submodule(path, nn.Identity())
        self.out_dim = last.in_features if isinstance(last, nn.Linear) else last.in_channels
        if file:
            load_file(self.model, file)
        if norm != "batch":
            _replace_batch_norms(self.model, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(m, 3, H, W) -> (m, out_dim)."""
        out = self.model(x)
        return (out if isinstance(out, Tensor) else out[0]).flatten(1)  # some add auxiliary heads


def _outputs(module: nn.Module) -> int:
    """Of a linear layer or a convolution (SqueezeNet classifies by one), else 0."""
    return getattr(module, "out_features", 0) or getattr(module, "out_channels", 0)


def _replace_batch_norms(model: nn.Module, norm: Norm) -> None:
    for path, part in list(model.named_modules()):
        if isinstance(part, nn.BatchNorm2d):
            other = make_norm(norm, part.num_features)
            # What pre-training learned of scale and shift; names and shapes are the same.
            learned = {k: v for k, v in part.state_dict().items() if k in other.state_dict()}
            other.load_state_dict(learned)
            model.set_submodule(path, other)
