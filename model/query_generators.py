"""Query generators: audio -> the queries of the transformer decoder."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.layers.attention import MultiheadAttention
from utils.registry import MODELS


class GeneratedQueries(NamedTuple):
    """Output of every query generator: queries (N, Q, C), and audio tokens (N, A, C) for the fusion block."""

    queries: Tensor
    audio_tokens: Tensor


class QueryLayer(nn.Module):
    """Self-attention, cross-attention to the audio tokens, feed-forward; each followed by residual and LayerNorm.

    Args:
        embed_dim: C.
        num_heads: attention heads.
        ffn_dim: width of the feed-forward block.
    """

    def __init__(self, embed_dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(embed_dim, num_heads, bias=False)
        self.cross_attn = MultiheadAttention(embed_dim, num_heads, bias=False)
        self.ffn = nn.Sequential(nn.Linear(embed_dim, ffn_dim), nn.GELU(), nn.Linear(ffn_dim, embed_dim))
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)

    def forward(self, queries: Tensor, audio_tokens: Tensor) -> Tensor:
        """Queries (N, Q, C) and audio tokens (N, A, C) -> queries (N, Q, C)."""
        queries = self.norm1(queries + self.self_attn(queries))
        queries = self.norm2(queries + self.cross_attn(queries, audio_tokens))
        return self.norm3(queries + self.ffn(queries))


@MODELS.register_module()
class RepeatGenerator(nn.Module):
    """Every query is the audio token.

    Args:
        num_queries: Q.
    """

    couples_frames = False

    def __init__(self, num_queries: int = 300) -> None:
        super().__init__()
        self.num_queries = num_queries

    def forward(self, audio: Tensor, features: Sequence[Tensor], frame_mask: Tensor | None = None) -> GeneratedQueries:
        """Audio (N, A, C) -> queries (N, Q, C); the features (N, C, H_l, W_l) are not used."""
        return GeneratedQueries(_one_token(audio).expand(-1, self.num_queries, -1), audio)


@MODELS.register_module()
class AttentionGenerator(nn.Module):
    """Learned queries that attend to the audio token (AVSegFormer, Gao et al., 2024).

    Args:
        num_layers: number of QueryLayers.
        num_queries: Q.
        embed_dim: C.
        num_heads: attention heads.
        ffn_dim: width of the feed-forward blocks.
    """

    couples_frames = False

    def __init__(
        self,
        num_layers: int = 6,
        num_queries: int = 300,
        embed_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 1024,
    ) -> None:
        super().__init__()
        self.query = nn.Embedding(num_queries, embed_dim)
        self.layers = nn.ModuleList(QueryLayer(embed_dim, num_heads, ffn_dim) for _ in range(num_layers))

    def forward(self, audio: Tensor, features: Sequence[Tensor], frame_mask: Tensor | None = None) -> GeneratedQueries:
        """Audio (N, A, C) -> queries (N, Q, C); the features (N, C, H_l, W_l) are not used."""
        queries = self.query.weight.expand(audio.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, audio)
        return GeneratedQueries(queries, audio)


@MODELS.register_module()
class EncoderDecoderGenerator(nn.Module):
    """Audio-visual disentangling decoder (AVD): decodes queries from the audio tokens of A-V fusion.

    The layers' outputs are mixed by one learned weight per layer, plus a bias.

    Args:
        av_fusion: A-V fusion, with audio tokens (N, A, C) as its output; None uses the audio token alone.
        num_queries: Q.
        num_layers: number of QueryLayers.
        embed_dim: C.
        num_heads: attention heads.
        ffn_dim: width of the feed-forward blocks.
        query_init: 'repeat' initialises every query with the audio token, as published. All queries then stay equal, so
            one is computed and expanded; only the head's learnable query distinguishes them. 'learned' adds a learned
            embedding per query, so that queries can represent different components of the audio.

    Raises:
        ValueError: an unknown `query_init`.
    """

    def __init__(
        self,
        av_fusion: nn.Module | None = None,
        num_queries: int = 300,
        num_layers: int = 3,
        embed_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 1024,
        query_init: str = "repeat",
    ) -> None:
        super().__init__()
        if query_init not in ("repeat", "learned"):
            raise ValueError(f"query_init is 'repeat' or 'learned', got {query_init!r}")
        self.num_queries = num_queries
        self.av_fusion = av_fusion
        self.couples_frames = av_fusion is not None and getattr(av_fusion, "couples_frames", True)
        self.query = nn.Embedding(num_queries, embed_dim) if query_init == "learned" else None
        self.decoder = nn.ModuleList(QueryLayer(embed_dim, num_heads, ffn_dim) for _ in range(num_layers))
        self.layer_mix = nn.Linear(num_layers, 1)

    def forward(self, audio: Tensor, features: Sequence[Tensor], frame_mask: Tensor | None = None) -> GeneratedQueries:
        """Audio (N, A, C), features (N, C, H_l, W_l), frame mask (N,) -> queries (N, Q, C), audio tokens (N, A, C)."""
        audio_tokens = audio if self.av_fusion is None else self.av_fusion(audio, features, frame_mask)
        start = _one_token(audio)
        queries = start if self.query is None else start + self.query.weight  # (N, 1 or Q, C)
        outputs = []
        for layer in self.decoder:
            queries = layer(queries, audio_tokens)
            outputs.append(queries)
        mixed = self.layer_mix(torch.stack(outputs, dim=-1)).squeeze(-1)
        return GeneratedQueries(mixed.expand(-1, self.num_queries, -1), audio_tokens)


def _one_token(audio: Tensor) -> Tensor:
    """The audio token (N, 1, C); the mean of several tokens per frame."""
    return audio if audio.shape[1] == 1 else audio.mean(dim=1, keepdim=True)
