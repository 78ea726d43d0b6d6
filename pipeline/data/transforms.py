"""From uint8 images to what a network takes, on the device and in batches. Floor 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.annotations import Fraction, NonNegativeInt, Probability

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def to_float(
    images: Tensor,
    image_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Adapt channels and size, scale to 0..1, then standardise.

    Args:
        images: (m, C, H, W) uint8.
        image_shape: (C', H', W') that the network takes; grey becomes RGB by repetition, RGB
            becomes grey by luma.
        mean, std: one number for all channels or one a channel, in 0..1.

    Returns:
        (m, C', H', W') float32.
    """
    channels, *size = image_shape
    x = images.float() / 255
    if x.shape[1] == 3 and channels == 1:
        x = (x * _per_channel(_LUMA, x.device)).sum(1, keepdim=True)
    elif x.shape[1] == 1 and channels == 3:
        x = x.expand(-1, 3, -1, -1)
    if list(x.shape[2:]) != size:
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
    return (x - _per_channel(tuple(mean), x.device)) / _per_channel(tuple(std), x.device)


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept on the device, as to send them would make the host wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(1, -1, 1, 1)


@dataclass(frozen=True)
class Augmentation:
    """Random distortions of uint8 images, each image its own draw.

    Attributes:
        affine: the six numbers of an affine map of the image plane, whose half width is 1, are
            each displaced by U[-affine, affine]: small turns, scalings, slants and shifts.
        crop_padding: zeros added on every side before a crop of the old size; 0 is no crop.
        flip: mirror left-right with probability one half.
        jitter: brightness, contrast and saturation are each scaled by 1 +- U[0, jitter].
    """

    affine: Fraction
    crop_padding: NonNegativeInt
    flip: bool
    jitter: Probability

    def __call__(self, images: Tensor, *generators: torch.Generator) -> Tensor:
        """(m, C, H, W) uint8 -> the same shape and dtype.

        Args:
            generators: on the CPU; each draws for as many images, in order.
        """
        each = len(images) // len(generators)
        drawn = [self._draw(each, generator) for generator in generators]
        parts = zip(*drawn, strict=True)
        numbers = (torch.cat(part).to(images.device, non_blocking=True) for part in parts)
        if self.affine:
            images = _affine(images, next(numbers))
        if self.crop_padding:
            images = _crop(images, self.crop_padding, next(numbers))
        if self.flip:
            images = torch.where(next(numbers).view(-1, 1, 1, 1), images.flip(-1), images)
        if self.jitter:
            images = _colour_jitter(images, next(numbers))
        return images

    def _draw(self, m: int, generator: torch.Generator) -> list[Tensor]:
        """What is random in m images: (m, ...) for each distortion that is on."""
        numbers = []
        if self.affine:
            displacement = self.affine * (2 * torch.rand(m, 2, 3, generator=generator) - 1)
            numbers.append(torch.eye(2, 3) + displacement)
        if self.crop_padding:
            span = 2 * self.crop_padding + 1
            numbers.append(torch.randint(0, span, (2, m), generator=generator).T)
        if self.flip:
            numbers.append(torch.rand(m, generator=generator) < 0.5)
        if self.jitter:
            numbers.append(1 + self.jitter * (2 * torch.rand(3, m, generator=generator).T - 1))
        return numbers


def _affine(images: Tensor, maps: Tensor) -> Tensor:
    """Maps (m, 2, 3) of the image plane."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, align_corners=False)  # zeros come in at the edges
    return moved.round().to(torch.uint8)


def _crop(images: Tensor, padding: int, corner: Tensor) -> Tensor:
    """Row and column (m, 2) of the corner in the padded image."""
    m, _, h, w = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = corner[:, :1] + torch.arange(h, device=images.device)  # (m, h)
    columns = corner[:, 1:] + torch.arange(w, device=images.device)  # (m, w)
    each = torch.arange(m, device=images.device).view(m, 1, 1)
    # advanced indices around the channel slice put it last: (m, h, w, C)
    return padded[each, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def _colour_jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Factors (m, 3) of brightness, contrast and saturation."""
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
    x = images.float() * brightness
    x = (x - x.mean((1, 2, 3), keepdim=True)) * contrast + x.mean((1, 2, 3), keepdim=True)
    grey = x.mean(1, keepdim=True)
    return (grey + (x - grey) * saturation).clamp(0, 255).round().to(torch.uint8)
