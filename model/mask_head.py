"""From memory and queries to masks: the pixel decoder and the mask predictor."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.recompute import recomputed
from model.layers.upsampling import conv_of_upsampled

PIXELS_AT_ONCE = 8192  # enough for products to run at their rate


class PixelDecoder(nn.Module):
    """The mask feature: the finest level of the memory, enlarged, on top of the backbone's finest map.

    Args:
        embed_dim: C.
        num_groups: of the group normalisations.
    """

    def __init__(self, embed_dim: int, num_groups: int) -> None:
        super().__init__()
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
        # With the channels of a pixel side by side, what follows reads the map as tokens without copying it.
        lateral = self.lateral_conv(finest.contiguous(memory_format=torch.channels_last))
        return self.out_conv(lateral + F.interpolate(memory, size=lateral.shape[-2:], mode="bilinear"))


class MaskPredictor(nn.Module):
    """Compares each pixel with each query, and turns the answers into logits.

    The products with the Q queries go through an MLP over the query axis, back to C channels; added to the mask
    feature, a small convolutional head makes logits of it. The first layer of the MLP is linear in the products, so it
    is applied to the queries instead where that is less work: relu(W (q f) + b) = relu((W q) f + b).

    Args:
        embed_dim: C.
        query_num: Q.
        num_classes: K.
        hidden_dim: width of the MLP.
        head_dims: channels of the head before and after it enlarges the picture.
        scale_factor: by which the head enlarges.
    """

    def __init__(
        self,
        embed_dim: int,
        query_num: int,
        num_classes: int,
        hidden_dim: int,
        head_dims: Sequence[int],
        scale_factor: int,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(width, out)
            for width, out in zip((query_num, hidden_dim, hidden_dim), (hidden_dim, hidden_dim, embed_dim), strict=True)
        )
        wide, narrow = head_dims
        self.reduce = nn.Conv2d(embed_dim, wide, kernel_size=3, padding=1)
        self.refine = nn.Conv2d(wide, narrow, kernel_size=3, padding=1)
        self.classify = nn.Conv2d(narrow, num_classes, kernel_size=1, bias=False)
        self.scale_factor = scale_factor
        self.checkpointing = False

    def forward(self, queries: Tensor, mask_feature: Tensor) -> Tensor:
        """Queries (N, Q, C) and mask feature (N, C, H, W) -> logits (N, K, scale * H, scale * W)."""
        frames = self._frames_at_once(mask_feature)
        if frames >= len(mask_feature):
            return self._logits(queries, mask_feature)
        pieces = zip(queries.split(frames), mask_feature.split(frames), strict=True)
        return torch.cat([recomputed(self._logits, *piece) for piece in pieces])

    def _frames_at_once(self, mask_feature: Tensor) -> int:
        """Of how many frames the MLP, `hidden_dim` wide, may have its activations at the same time."""
        if self.checkpointing and self.training:
            return 1  # in the backward pass
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler would unroll them
            return len(mask_feature)
        return max(1, PIXELS_AT_ONCE // mask_feature[0, 0].numel())

    def _logits(self, queries: Tensor, mask_feature: Tensor) -> Tensor:
        coarse = self.reduce(self._answer(queries, mask_feature))
        fine = conv_of_upsampled(coarse, self.refine.weight, self.refine.bias, float(self.scale_factor))
        return self.classify(_relu(fine))

    def _answer(self, queries: Tensor, mask_feature: Tensor) -> Tensor:
        """Mask feature plus the MLP of its products with the queries, (N, C, H, W)."""
        first, second, third = (cast(nn.Linear, layer) for layer in self.layers)
        tokens = mask_feature.flatten(2).transpose(1, 2)  # (N, H * W, C)
        if self._folding_pays(tokens.shape[1], tokens.shape[2]):
            folded = first.weight @ queries  # (N, hidden, C)
            hidden = _relu(torch.baddbmm(first.bias, tokens, folded.transpose(1, 2))).flatten(0, 1)
        else:
            hidden = _relu(first((tokens @ queries.transpose(1, 2)).flatten(0, 1)))
        # Two axes, (N * H * W, hidden): on a view of a product, working in place would copy it in the backward pass.
        hidden = _relu(second(hidden))
        return (tokens + third(hidden).view_as(tokens)).transpose(1, 2).unflatten(2, mask_feature.shape[-2:])

    def _folding_pays(self, pixels: int, channels: int) -> bool:
        """Whether Q * C * hidden + pixels * C * hidden is less than pixels * Q * (C + hidden) multiplications."""
        hidden, queries = cast(nn.Linear, self.layers[0]).weight.shape
        return channels * hidden * (queries + pixels) < pixels * queries * (channels + hidden)


def _relu(x: Tensor) -> Tensor:
    """In place, but for bf16 on a CPU: there PyTorch's in-place form takes three times as long as the other."""
    return F.relu(x, inplace=x.dtype != torch.bfloat16 or x.device.type != "cpu")
