"""Queries out of sound: what the mask decoder will look for in the picture."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.layers.attention import MultiheadAttention
from utils.registry import QUERY_GENERATORS


class GeneratedQueries(NamedTuple):
    """What every query generator returns: queries (N, Q, C) and the audio tokens (N, A, C) that later fusion uses."""

    queries: Tensor
    audio_tokens: Tensor


class QueryLayer(nn.Module):
    """Self-attention, cross-attention to the audio tokens, feed-forward; each followed by residual and LayerNorm.

    Args:
        embed_dim: C.
        num_heads: attention heads.
        hidden_dim: width of the feed-forward block.
    """

    def __init__(self, embed_dim: int, num_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(embed_dim, num_heads, bias=False)
        self.cross_attn = MultiheadAttention(embed_dim, num_heads, bias=False)
        self.ffn = nn.Sequential(nn.Linear(embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, embed_dim))
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.norm3 = nn.LayerNorm(embed_dim)

    def forward(self, queries: Tensor, audio_tokens: Tensor) -> Tensor:
        """Queries (N, Q, C) and audio tokens (N, A, C) -> queries (N, Q, C)."""
        queries = self.norm1(queries + self.self_attn(queries))
        queries = self.norm2(queries + self.cross_attn(queries, audio_tokens))
        return self.norm3(queries + self.ffn(queries))


@QUERY_GENERATORS.register_module()
class RepeatGenerator(nn.Module):
    """Every query is the audio token.

    Args:
        query_num: Q.
    """

    frames_share = False

    def __init__(self, query_num: int = 300) -> None:
        super().__init__()
        self.query_num = query_num

    def forward(self, audio: Tensor, features: Sequence[Tensor], frame_mask: Tensor | None = None) -> GeneratedQueries:
        """Audio (N, 1, C) -> queries (N, Q, C); the features (N, C, H_l, W_l) are not looked at."""
        return GeneratedQueries(audio.expand(-1, self.query_num, -1), audio)


@QUERY_GENERATORS.register_module()
class AttentionGenerator(nn.Module):
    """Learned queries that attend to the audio token (AVSegFormer, Gao et al., 2024).

    Args:
        num_layers: QueryLayers.
        query_num: Q.
        embed_dim: C.
        num_heads: attention heads.
        hidden_dim: width of the feed-forward blocks.
    """

    frames_share = False

    def __init__(
        self,
        num_layers: int = 6,
        query_num: int = 300,
        embed_dim: int = 256,
        num_heads: int = 8,
        hidden_dim: int = 1024,
    ) -> None:
        super().__init__()
        self.query = nn.Embedding(query_num, embed_dim)
        self.layers = nn.ModuleList(QueryLayer(embed_dim, num_heads, hidden_dim) for _ in range(num_layers))

    def forward(self, audio: Tensor, features: Sequence[Tensor], frame_mask: Tensor | None = None) -> GeneratedQueries:
        """Audio (N, 1, C) -> queries (N, Q, C); the features (N, C, H_l, W_l) are not looked at."""
        queries = self.query.weight.expand(audio.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, audio)
        return GeneratedQueries(queries, audio)


@QUERY_GENERATORS.register_module()
class EncoderDecoderGenerator(nn.Module):
    """Audio-visual disentangling decoder (AVD): audio tokens from A-V fusion, decoded into queries.

    The outputs of all layers are mixed by one learned weight a layer, plus a bias.

    Args:
        early_fusion: A-V fusion that makes the audio tokens (N, A, C); the audio token alone when None.
        query_num: Q.
        num_layers_decoder: QueryLayers.
        embed_dim: C.
        num_heads: attention heads.
        hidden_dim: width of the feed-forward blocks.
        query_init: 'repeat' starts every query as the audio token, as published. All queries then stay equal, so one is
            computed and repeated: what tells them apart is only the head's learnable query. 'learned' adds an embedding
            a query to the audio token, so that queries can take up different components of the sound.
    """

    def __init__(
        self,
        early_fusion: nn.Module | None = None,
        query_num: int = 300,
        num_layers_decoder: int = 3,
        embed_dim: int = 256,
        num_heads: int = 8,
        hidden_dim: int = 1024,
        query_init: str = "repeat",
    ) -> None:
        super().__init__()
        if query_init not in ("repeat", "learned"):
            raise ValueError(f"query_init is 'repeat' or 'learned', got {query_init!r}")
        self.query_num = query_num
        self.early_fusion = early_fusion
        self.frames_share = early_fusion is not None and getattr(early_fusion, "frames_share", True)
        self.query = nn.Embedding(query_num, embed_dim) if query_init == "learned" else None
        self.decoder = nn.ModuleList(QueryLayer(embed_dim, num_heads, hidden_dim) for _ in range(num_layers_decoder))
        self.layer_mix = nn.Linear(num_layers_decoder, 1)

    def forward(self, audio: Tensor, features: Sequence[Tensor], frame_mask: Tensor | None = None) -> GeneratedQueries:
        """Audio (N, 1, C), features (N, C, H_l, W_l), frame mask (N,) -> queries (N, Q, C), audio tokens (N, A, C)."""
        audio_tokens = audio if self.early_fusion is None else self.early_fusion(audio, features, frame_mask)
        queries = audio if self.query is None else audio + self.query.weight  # (N, 1 or Q, C)
        outputs = []
        for layer in self.decoder:
            queries = layer(queries, audio_tokens)
            outputs.append(queries)
        mixed = self.layer_mix(torch.stack(outputs, dim=-1)).squeeze(-1)
        return GeneratedQueries(mixed.expand(-1, self.query_num, -1), audio_tokens)
