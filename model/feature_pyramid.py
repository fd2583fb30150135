"""A feature pyramid for backbones with maps of one scale: vision transformers."""

import math

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from model.backbones import STRIDES


class FeaturePyramid(nn.Module):
    """Simple feature pyramid from a single map (ViTDet, Li et al., 2022, arXiv 2203.16527).

    A finer scale is the map after transposed convolutions of stride 2, each of which halves the channels; a coarser one
    is its maximum over 2 x 2 pixels. The 1x1 convolution and normalisation that ViTDet applies to each scale are the
    head's input projection; its 3x3 convolution is left out.

    The map's stride need not be a power of two: 14 counts as 16, and each scale is then resized to the frame's size
    over its stride.

    Args:
        in_channels: C of the map.
        stride: pixels of the frame per pixel of the map, at least 4.

    Attributes:
        channels: channels of the four scales.

    Raises:
        ValueError: a stride below 4, or channels that cannot be halved often enough.
    """

    def __init__(self, in_channels: int, stride: int) -> None:
        super().__init__()
        if stride < STRIDES[0]:
            raise ValueError(f"a feature pyramid needs a map at stride {STRIDES[0]} or coarser, got stride {stride}")
        octave = round(math.log2(stride))
        halvings = [max(0, octave - round(math.log2(target))) for target in STRIDES]
        if in_channels % 2 ** max(halvings):
            raise ValueError(
                f"{in_channels} channels cannot be halved {max(halvings)} times, from stride {stride} to {STRIDES[0]}"
            )
        self.channels = tuple(in_channels // 2**count for count in halvings)
        self.norm = LayerNorm2d(in_channels)
        self.scales = nn.ModuleList(
            _scale(in_channels, halved, pooled=max(0, round(math.log2(target)) - octave))
            for halved, target in zip(halvings, STRIDES, strict=True)
        )

    def forward(self, feature: Tensor, frame_size: tuple[int, int]) -> list[Tensor]:
        """A map (N, C, H / stride, W / stride) of frames of size (H, W) -> maps (N, channels[l], H / 4 ... H / 32)."""
        feature = self.norm(feature)
        maps = []
        for scale, stride in zip(self.scales, STRIDES, strict=True):
            size = [math.ceil(side / stride) for side in frame_size]
            scaled = scale(feature)
            if list(scaled.shape[-2:]) != size:
                scaled = F.interpolate(scaled, size=size, mode="bilinear")
            maps.append(scaled)
        return maps


def _scale(channels: int, halved: int, pooled: int) -> nn.Sequential:
    """`halved` transposed convolutions with LayerNorm and GELU between them, or `pooled` maximum poolings."""
    layers: list[nn.Module] = []
    for index in range(halved):
        width = channels // 2**index
        layers.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
        if index + 1 < halved:
            layers += [LayerNorm2d(width // 2), nn.GELU()]
    layers += [nn.MaxPool2d(kernel_size=2, ceil_mode=True) for _ in range(pooled)]
    return nn.Sequential(*layers)
