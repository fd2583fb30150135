"""The transformer: deformable self-attention over the picture's scales, then queries that attend to the result."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.attention import MultiheadAttention
from model.layers.dropout import Dropout
from model.layers.position import SpatialShapes, reference_points
from model.layers.recompute import recomputed
from ops import MSDeformAttn
from utils.registry import TRANSFORMER_LAYERS, TRANSFORMERS


class TransformerOutput(NamedTuple):
    """Memory (N, L, C) of the encoder and queries (A, Q, C) of the decoder, A = N where all frames are answered."""

    memory: Tensor
    queries: Tensor


class FeedForward(nn.Module):
    """Linear, GELU, dropout, linear, dropout; residual and LayerNorm.

    Args:
        embed_dim: C.
        ffn_dim: hidden width.
        dropout: probability.
    """

    def __init__(self, embed_dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        # GELU and dropout cost less than keeping their results; a compiler makes that choice itself.
        again = self.training and not torch.compiler.is_compiling()
        out = recomputed(self._from_hidden, self.linear1(x), enable=again)
        return self.norm(x + self.dropout(out))

    def _from_hidden(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.linear2(self.dropout(F.gelu(hidden)))
        return out


@TRANSFORMER_LAYERS.register_module()
class EncoderLayer(nn.Module):
    """Multi-scale deformable self-attention (Zhu et al., 2021) and a feed-forward block.

    Args:
        dim: C.
        ffn_dim: width of the feed-forward block.
        dropout: probability.
        num_levels: scales.
        num_heads: attention heads.
        num_points: sampling points a head and scale.
    """

    def __init__(
        self,
        dim: int = 256,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        num_levels: int = 3,
        num_heads: int = 8,
        num_points: int = 4,
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(dim, num_levels, num_heads, num_points)
        self.norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)
        self.ffn = FeedForward(dim, ffn_dim, dropout)

    def forward(self, x: Tensor, position: Tensor, points: Tensor, shapes: SpatialShapes) -> Tensor:
        """Tokens (N, L, C), position (L, C), reference points (L, 2) -> tokens (N, L, C)."""
        x = self.norm(x + self.dropout(self.self_attn(x + position, points, x, shapes)))
        return self.ffn(x)


@TRANSFORMER_LAYERS.register_module()
class DecoderLayer(nn.Module):
    """Self-attention of the queries, full cross-attention to the memory, and a feed-forward block.

    Args:
        dim: C.
        ffn_dim: width of the feed-forward block.
        dropout: probability, of attention weights too.
        num_heads: attention heads.
    """

    def __init__(self, dim: int = 256, ffn_dim: int = 2048, dropout: float = 0.1, num_heads: int = 8) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(dim, num_heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = MultiheadAttention(dim, num_heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)
        self.ffn = FeedForward(dim, ffn_dim, dropout)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Queries (N, Q, C) and memory (N, L, C) -> queries (N, Q, C)."""
        queries = self.norm1(queries + self.dropout(self.self_attn(queries)))
        queries = self.norm2(queries + self.dropout(self.cross_attn(queries, memory)))
        return self.ffn(queries)


@TRANSFORMERS.register_module(name=["Transformer", "AVSTransformer"])
class Transformer(nn.Module):
    """Encoder over the pixels of all scales and decoder of the queries.

    Args:
        encoder_layers: EncoderLayer modules, in order.
        decoder_layers: DecoderLayer modules, in order.
    """

    def __init__(self, encoder_layers: list[EncoderLayer], decoder_layers: list[DecoderLayer]) -> None:
        super().__init__()
        self.encoder_layers = nn.ModuleList(encoder_layers)
        self.decoder_layers = nn.ModuleList(decoder_layers)
        self.checkpointing = False

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        position: Tensor,
        shapes: SpatialShapes,
        answered: Tensor | None = None,
    ) -> TransformerOutput:
        """Encode the pixels and decode the queries.

        Args:
            queries: (A, Q, C).
            tokens: pixels of all scales, level by level, row by row, (N, L, C).
            position: position and level of each pixel, (L, C).
            shapes: (H, W) of each level.
            answered: (A,), indices of the frames that the queries ask; None: all, A = N.
        """
        points = self.points(shapes, tokens.device)
        again = self.checkpointing and self.training
        memory = tokens
        for layer in self.encoder_layers:
            memory = recomputed(layer, memory, position, points, shapes, enable=again)
        asked = memory if answered is None else memory[answered]
        for layer in self.decoder_layers:
            queries = recomputed(layer, queries, asked, enable=again)
        return TransformerOutput(memory, queries)

    def points(self, shapes: SpatialShapes, device: torch.device) -> Tensor:
        """Reference points (L, 2) of the pixels."""
        return reference_points(shapes, device)
