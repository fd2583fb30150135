"""The deformable attention layer, with the published parameter names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ops.functional import Backend, SpatialShapes, ms_deform_attn_fused


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention layer (Deformable DETR).

    Under autocast, projections and value are in its dtype, offsets and logits in float32: coordinates in half precision
    would be off by a fraction of a pixel.

    Args:
        embed_dim: C, channels of query and memory; a multiple of `num_heads`.
        num_levels: levels of the feature pyramid.
        num_heads: M.
        num_points: sampling points per head and level.
        backend: see `ms_deform_attn`.

    Raises:
        ValueError: `embed_dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_levels: int = 3,
        num_heads: int = 8,
        num_points: int = 4,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_levels, self.num_heads, self.num_points, self.backend = num_levels, num_heads, num_points, backend
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets on a ring, one direction per head, growing with the point; equal weights; Xavier for projections."""
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        ring = torch.stack((angle.cos(), angle.sin()), -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)  # onto a square: steps of one pixel
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        bias = ring[:, None, None] * steps[:, None]  # (M, 1, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, reference_points: Tensor, memory: Tensor, spatial_shapes: SpatialShapes) -> Tensor:
        """Attend from each query to a few points of each level.

        Args:
            query: (N, Q, C).
            reference_points: (Q, 2), (Q, levels, 2) or (N, Q, levels, 2), x then y, in [0, 1].
            memory: (N, L, C), levels concatenated, row-major.
            spatial_shapes: (height, width) per level.

        Returns:
            (N, Q, C).

        Raises:
            ValueError: shapes do not match.
        """
        samples = (self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(memory).unflatten(-1, (self.num_heads, -1))  # (N, L, M, D)
        offsets = self.sampling_offsets(query).unflatten(-1, (*samples, 2))  # (N, Q, M, levels, points, 2)
        logits = self.attention_weights(query).unflatten(-1, samples)  # (N, Q, M, levels, points)
        out = ms_deform_attn_fused(value, spatial_shapes, reference_points, offsets, logits, self.backend)
        return self.output_proj(out)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"num_levels={self.num_levels}, num_heads={self.num_heads}, num_points={self.num_points}"
