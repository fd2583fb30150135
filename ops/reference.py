"""The definition of multi-scale deformable attention in plain PyTorch.

Deformable DETR (Zhu et al., ICLR 2021), equation 2: each query samples a few points of each level of a feature pyramid,
bilinearly and with zeros outside, and sums them with attention weights. The compiled kernels are tested against this
definition, which runs where they cannot be built.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[tuple[int, int]]


def ms_deform_attn_torch(
    value: Tensor, shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sample `value` at the locations and sum with the weights.

    Args:
        value: (N, L, M, D), levels concatenated, row-major.
        shapes: (height, width) per level; their areas sum to L.
        sampling_locations: (N, Q, M, levels, points, 2), x then y, 0 and 1 are the outer edges of the level.
        attention_weights: (N, Q, M, levels, points).

    Returns:
        (N, Q, M * D) in the dtype of `value`; float16 and bfloat16 are summed in float32.
    """
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    work = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
    if batch == 0 or queries == 0:
        nothing = (value.sum() + sampling_locations.sum() + attention_weights.sum()) * 0
        return nothing.to(value.dtype).expand(batch, queries, heads * channels).clone()
    grid = (2 * sampling_locations.to(work) - 1).transpose(1, 2).flatten(0, 1)  # (N*M, Q, levels, points, 2)
    sampled = []
    for level, rows in enumerate(value.to(work).split([height * width for height, width in shapes], dim=1)):
        plane = rows.permute(0, 2, 3, 1).reshape(batch * heads, channels, *shapes[level])  # (N*M, D, H, W)
        sampled.append(F.grid_sample(plane, grid[:, :, level], "bilinear", "zeros", align_corners=False))
    points = torch.stack(sampled, dim=-2).flatten(-2)  # (N*M, D, Q, levels*points)
    weights = attention_weights.to(work).transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (points * weights).sum(-1)  # (N*M, D, Q)
    return out.view(batch, heads * channels, queries).transpose(1, 2).contiguous().to(value.dtype)


def sampling_locations(reference_points: Tensor, sampling_offsets: Tensor, shapes: Shapes) -> Tensor:
    """Locations in [0, 1] from reference points in [0, 1] and offsets in pixels of each level.

    Args:
        reference_points: (N or 1, Q, levels or 1, 2).
        sampling_offsets: (N, Q, M, levels, points, 2).
        shapes: (height, width) per level.

    Returns:
        (N, Q, M, levels, points, 2).
    """
    size = sampling_offsets.new_tensor([(width, height) for height, width in shapes])  # (levels, 2)
    return reference_points[:, :, None, :, None, :] + sampling_offsets / size[:, None, :]


def ms_deform_attn_fused_torch(
    value: Tensor, shapes: Shapes, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor
) -> Tensor:
    """`ms_deform_attn_torch` from offsets and logits: softmax over levels and points, locations, then the sum.

    Args:
        value: (N, L, M, D).
        shapes: (height, width) per level.
        reference_points: (N or 1, Q, levels or 1, 2) in [0, 1].
        sampling_offsets: (N, Q, M, levels, points, 2) in pixels of each level.
        attention_logits: (N, Q, M, levels, points).

    Returns:
        (N, Q, M * D) in the dtype of `value`.
    """
    weights = attention_logits.flatten(-2).softmax(-1).view_as(attention_logits)
    return ms_deform_attn_torch(value, shapes, sampling_locations(reference_points, sampling_offsets, shapes), weights)
