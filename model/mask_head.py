"""Pixel decoder (memory -> mask feature) and mask head (queries and mask feature -> logits)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.recompute import recompute
from model.layers.upsampling import conv_of_upsampled
from utils.registry import MODELS

CHUNK_PIXELS = 8192  # large enough for matrix products at full rate


@MODELS.register_module()
class PixelDecoder(nn.Module):
    """Mask feature: the finest level of the memory, upsampled, plus a lateral of the backbone's finest map.

    Args:
        embed_dim: C.
        num_groups: groups of the GroupNorms.
    """

    def __init__(self, embed_dim: int = 256, num_groups: int = 32) -> None:
        super().__init__()
        if embed_dim % num_groups:
            raise ValueError(f"embed_dim={embed_dim} is not a multiple of num_groups={num_groups}")
        self.lateral_conv = nn.Sequential(
            nn.Conv2d(embed_dim, embed_dim, kernel_size=1), nn.GroupNorm(num_groups, embed_dim)
        )
        self.out_conv = nn.Sequential(
            nn.Conv2d(embed_dim, embed_dim, kernel_size=3, padding=1),
            nn.GroupNorm(num_groups, embed_dim),
            nn.ReLU(inplace=True),
        )

    def forward(self, finest: Tensor, memory: Tensor) -> Tensor:
        """Finest map (N, C, H, W) and a level of the memory (N, C, H', W') -> mask feature (N, C, H, W)."""
        # channels_last: the fusion block and the mask head view the map as tokens without a copy.
        lateral = self.lateral_conv(finest.contiguous(memory_format=torch.channels_last))
        return self.out_conv(lateral + F.interpolate(memory, size=lateral.shape[-2:], mode="bilinear"))


@MODELS.register_module()
class MaskPredictor(nn.Module):
    """Mask head: an MLP of query-pixel similarities, added to the mask feature, then a convolutional head.

    The MLP maps the Q similarities of each pixel to C channels.

    Args:
        embed_dim: C.
        num_queries: Q.
        num_classes: K.
        hidden_dim: width of the MLP.
        head_dims: channels of the convolutional head before and after upsampling.
        scale_factor: upsampling factor from mask feature to logits.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_queries: int = 300,
        num_classes: int = 1,
        hidden_dim: int = 2048,
        head_dims: Sequence[int] = (128, 32),
        scale_factor: int = 4,
    ) -> None:
        super().__init__()
        widths = (num_queries, hidden_dim, hidden_dim, embed_dim)
        self.layers = nn.ModuleList(nn.Linear(width, out) for width, out in pairwise(widths))
        wide, narrow = head_dims
        self.reduce = nn.Conv2d(embed_dim, wide, kernel_size=3, padding=1)
        self.refine = nn.Conv2d(wide, narrow, kernel_size=3, padding=1)
        self.classify = nn.Conv2d(narrow, num_classes, kernel_size=1, bias=False)
        self.scale_factor = scale_factor
        self.use_checkpoint = False

    def forward(self, queries: Tensor, mask_feature: Tensor) -> Tensor:
        """Queries (N, Q, C) and mask feature (N, C, H, W) -> logits (N, K, scale * H, scale * W)."""
        frames = self._chunk_size(mask_feature)
        if frames >= mask_feature.shape[0]:  # unlike len, keeps the size symbolic in an export
            return self._logits(queries, mask_feature)
        chunks = zip(queries.split(frames), mask_feature.split(frames), strict=True)
        return torch.cat([recompute(self._logits, *chunk) for chunk in chunks])

    def _chunk_size(self, mask_feature: Tensor) -> int:
        """Frames per pass through the MLP, whose activations are `hidden_dim` wide."""
        if self.use_checkpoint and self.training:
            return 1
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler would unroll the loop
            return mask_feature.shape[0]
        return max(1, CHUNK_PIXELS // mask_feature[0, 0].numel())

    def _logits(self, queries: Tensor, mask_feature: Tensor) -> Tensor:
        coarse = self.reduce(self._fused(queries, mask_feature))
        fine = conv_of_upsampled(coarse, self.refine.weight, self.refine.bias, float(self.scale_factor))
        return self.classify(F.relu(fine, inplace=True))

    def _fused(self, queries: Tensor, mask_feature: Tensor) -> Tensor:
        """Mask feature plus the MLP of its similarities with the queries, (N, C, H, W)."""
        first, second, third = (cast(nn.Linear, layer) for layer in self.layers)
        tokens = mask_feature.flatten(2).transpose(1, 2)  # (N, H * W, C)
        # 2-D, (N * H * W, hidden): ReLU in place on a view would copy it in the backward pass.
        hidden = F.relu(first((tokens @ queries.transpose(1, 2)).flatten(0, 1)), inplace=True)
        hidden = F.relu(second(hidden), inplace=True)
        return (tokens + third(hidden).view_as(tokens)).transpose(1, 2).unflatten(2, mask_feature.shape[-2:])
