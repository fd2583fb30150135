"""The transformer: an encoder of the pixels by deformable attention, and a decoder of the queries."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.attention import MultiheadAttention
from model.layers.dropout import Dropout
from model.layers.position import SpatialShapes, reference_points
from model.layers.recompute import recompute
from ops import MSDeformAttn
from utils.registry import MODELS


class FeedForward(nn.Module):
    """Linear, GELU, dropout, linear, dropout; residual and LayerNorm.

    Args:
        embed_dim: C.
        ffn_dim: hidden width.
        dropout: rate.
    """

    def __init__(self, embed_dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        # GELU and dropout are cheaper to recompute than to store; a compiler decides this itself.
        use_checkpoint = self.training and not torch.compiler.is_compiling()
        out = recompute(self._from_hidden, self.linear1(x), enable=use_checkpoint)
        return self.norm(x + self.dropout(out))

    def _from_hidden(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.linear2(self.dropout(F.gelu(hidden)))
        return out


@MODELS.register_module()
class EncoderLayer(nn.Module):
    """Multi-scale deformable self-attention (Deformable DETR, Zhu et al., 2021) and a feed-forward block.

    Args:
        embed_dim: C.
        ffn_dim: width of the feed-forward block.
        dropout: rate.
        num_levels: scales.
        num_heads: attention heads.
        num_points: sampling points per head and scale.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        num_levels: int = 3,
        num_heads: int = 8,
        num_points: int = 4,
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(embed_dim, num_levels, num_heads, num_points)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)

    def forward(self, x: Tensor, position: Tensor, points: Tensor, shapes: SpatialShapes) -> Tensor:
        """Tokens (N, L, C), position (L, C), reference points (L, 2) -> tokens (N, L, C)."""
        x = self.norm(x + self.dropout(self.self_attn(x + position, points, x, shapes)))
        return self.ffn(x)


@MODELS.register_module()
class DecoderLayer(nn.Module):
    """Self-attention of the queries, full cross-attention to the memory, and a feed-forward block.

    Args:
        embed_dim: C.
        ffn_dim: width of the feed-forward block.
        dropout: rate, also of the attention weights.
        num_heads: attention heads.
    """

    def __init__(self, embed_dim: int = 256, ffn_dim: int = 2048, dropout: float = 0.1, num_heads: int = 8) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(embed_dim, num_heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.cross_attn = MultiheadAttention(embed_dim, num_heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Queries (N, Q, C) and memory (N, L, C) -> queries (N, Q, C)."""
        queries = self.norm1(queries + self.dropout(self.self_attn(queries)))
        queries = self.norm2(queries + self.dropout(self.cross_attn(queries, memory)))
        return self.ffn(queries)


class Encoder(nn.Module):
    """Encoder layers over the pixels of all levels.

    Args:
        layers: EncoderLayer modules, in order.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.use_checkpoint = False

    def forward(self, tokens: Tensor, position: Tensor, shapes: SpatialShapes) -> Tensor:
        """Encode the pixels.

        Args:
            tokens: pixels, level by level, row by row, (N, L, C).
            position: position and level encoding of each pixel, (L, C).
            shapes: (H, W) of each level.

        Returns:
            The memory, (N, L, C).
        """
        points = reference_points(shapes, tokens.device)
        for layer in self.layers:
            tokens = recompute(layer, tokens, position, points, shapes, enable=self.use_checkpoint and self.training)
        return tokens


class Decoder(nn.Module):
    """Decoder layers over the queries.

    Args:
        layers: DecoderLayer modules, in order.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.use_checkpoint = False

    def forward(self, queries: Tensor, memory: Tensor) -> list[Tensor]:
        """Queries (N, Q, C) and memory (N, L, C) -> the queries (N, Q, C) after each layer, in order."""
        decoded = []
        for layer in self.layers:
            queries = recompute(layer, queries, memory, enable=self.use_checkpoint and self.training)
            decoded.append(queries)
        return decoded or [queries]


@MODELS.register_module()
class Transformer(nn.Module):
    """An encoder of the pixels and a decoder of the queries; the head runs the fusion block between the two.

    Args:
        encoder_layers: EncoderLayer modules, in order.
        decoder_layers: DecoderLayer modules, in order.

    Attributes:
        encoder: tokens, position, shapes -> memory; see Encoder.
        decoder: queries, memory -> queries after each layer; see Decoder.
    """

    def __init__(self, encoder_layers: Sequence[nn.Module], decoder_layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoder = Encoder(encoder_layers)
        self.decoder = Decoder(decoder_layers)
