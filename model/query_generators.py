"""Query generators: audio -> the queries of the transformer decoder."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.attention import MultiheadAttention
from utils.registry import MODELS


class GeneratedQueries(NamedTuple):
    """Output of every query generator.

    Attributes:
        queries: (N, Q, C).
        audio_tokens: for the fusion block, (N, A, C).
        aux_loss: the generator's own loss (scalar), added to ModelOutput.aux_loss; 0 without one.
    """

    queries: Tensor
    audio_tokens: Tensor
    aux_loss: Tensor | float = 0.0


def diversity_loss(queries: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    """Mean squared cosine similarity of different queries of a frame: 0 if they are orthogonal, 1 if all are parallel.

    The redundancy penalty of self-attentive sentence embeddings (Lin et al., 2017, arXiv 1703.03130) on normalised
    vectors. With Q > C it cannot vanish: its minimum is then (Q - C) / (C * (Q - 1)).

    Args:
        queries: (N, Q, C), float.
        frame_mask: (N,), 0 for padded frames, which do not count; None counts all.

    Returns:
        Scalar float32 in [0, 1]; 0 for a single query.
    """
    count = queries.shape[1]
    if count < 2:
        return queries.new_zeros((), dtype=torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        unit = F.normalize(queries.float(), dim=-1)
        cosine = unit @ unit.transpose(1, 2)  # (N, Q, Q)
        off_diagonal = cosine.square().sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).square().sum(1)
        per_frame = off_diagonal / (count * (count - 1))  # (N,)
    if frame_mask is None:
        return per_frame.mean()
    weight = frame_mask.to(per_frame.dtype)
    return (per_frame * weight).sum() / weight.sum().clamp(min=1.0)


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
    """Every query is the audio token, or with A-V fusion the mean of its audio tokens: AVD left out.

    Args:
        av_fusion: A-V fusion, with audio tokens (N, A, C) as its output; None uses the audio token alone.
        num_queries: Q.
    """

    def __init__(self, av_fusion: nn.Module | None = None, num_queries: int = 300) -> None:
        super().__init__()
        self.av_fusion = av_fusion
        self.num_queries = num_queries

    @property
    def couples_frames(self) -> bool:
        """By temporal A-V fusion."""
        return _couples_frames(self.av_fusion)

    def forward(self, audio: Tensor, features: Sequence[Tensor], frame_mask: Tensor | None = None) -> GeneratedQueries:
        """Audio (N, A, C), features (N, C, H_l, W_l), frame mask (N,) -> queries (N, Q, C), audio tokens (N, A, C)."""
        audio_tokens = audio if self.av_fusion is None else self.av_fusion(audio, features, frame_mask)
        return GeneratedQueries(_one_token(audio_tokens).expand(-1, self.num_queries, -1), audio_tokens)


@MODELS.register_module()
class AttentionGenerator(nn.Module):
    """Learned queries that attend to the audio token (AVSegFormer, Gao et al., 2024).

    Args:
        num_layers: number of QueryLayers.
        num_queries: Q.
        embed_dim: C.
        num_heads: attention heads.
        ffn_dim: width of the feed-forward blocks.
        diversity_weight: weight of `diversity_loss` in training; 0 leaves it out, as published.

    Raises:
        ValueError: a negative `diversity_weight`.
    """

    def __init__(
        self,
        num_layers: int = 6,
        num_queries: int = 300,
        embed_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 1024,
        diversity_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.diversity_weight = _checked_weight(diversity_weight)
        self.query = nn.Embedding(num_queries, embed_dim)
        self.layers = nn.ModuleList(QueryLayer(embed_dim, num_heads, ffn_dim) for _ in range(num_layers))

    @property
    def couples_frames(self) -> bool:
        """In training, by the diversity loss."""
        return self.training and self.diversity_weight > 0

    def forward(self, audio: Tensor, features: Sequence[Tensor], frame_mask: Tensor | None = None) -> GeneratedQueries:
        """Audio (N, A, C) -> queries (N, Q, C); the features (N, C, H_l, W_l) are not used."""
        queries = self.query.weight.expand(audio.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, audio)
        return GeneratedQueries(queries, audio, _weighted_diversity(self, queries, frame_mask))


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
        diversity_weight: weight of `diversity_loss` in training; 0 leaves it out, as published. It needs queries that
            differ, `query_init='learned'`.

    Raises:
        ValueError: an unknown `query_init`, or a `diversity_weight` that is negative or has no effect.
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
        diversity_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if query_init not in ("repeat", "learned"):
            raise ValueError(f"query_init is 'repeat' or 'learned', got {query_init!r}")
        self.diversity_weight = _checked_weight(diversity_weight)
        if self.diversity_weight and query_init == "repeat":
            raise ValueError(
                f"diversity_weight={diversity_weight} has no effect on equal queries: set query_init='learned' too"
            )
        self.num_queries = num_queries
        self.av_fusion = av_fusion
        self.query = nn.Embedding(num_queries, embed_dim) if query_init == "learned" else None
        self.decoder = nn.ModuleList(QueryLayer(embed_dim, num_heads, ffn_dim) for _ in range(num_layers))
        self.layer_mix = nn.Linear(num_layers, 1)

    @property
    def couples_frames(self) -> bool:
        """By temporal A-V fusion, and in training by the diversity loss."""
        return _couples_frames(self.av_fusion) or (self.training and self.diversity_weight > 0)

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
        mixed = mixed.expand(-1, self.num_queries, -1)
        return GeneratedQueries(mixed, audio_tokens, _weighted_diversity(self, mixed, frame_mask))


@MODELS.register_module()
class VisualQueryGenerator(nn.Module):
    """Queries from pixels instead of sound: learned queries gather pixels, and the audio then selects among them.

    After the vision-centric transformer (VCT, Huang et al., 2025, arXiv 2506.23623): each query is first derived from a
    region of the frame, rich in visual detail, and only then meets the sound. Here a layer is two QueryLayers, one with
    the pixels of the coarsest scales as memory, and one with the audio tokens. VCT's audio prototypes and its
    assignment of pixels to queries by Gumbel-softmax are left out. After the last layer, an audio gate in (0, 1) per
    query scales it, so that a query of a silent object can be turned off.

    Args:
        positional_encoding: of the pixels, added to them; the head's.
        av_fusion: A-V fusion, with audio tokens (N, A, C) as its output; None uses the audio token alone.
        num_queries: Q.
        num_layers: pairs of QueryLayers.
        num_scales: coarsest scales whose pixels are read.
        embed_dim: C.
        num_heads: attention heads.
        ffn_dim: width of the feed-forward blocks.
        diversity_weight: weight of `diversity_loss` in training; 0 leaves it out.

    Raises:
        ValueError: `num_layers` or `num_scales` below 1, or a negative `diversity_weight`.
    """

    def __init__(
        self,
        positional_encoding: nn.Module,
        av_fusion: nn.Module | None = None,
        num_queries: int = 300,
        num_layers: int = 3,
        num_scales: int = 1,
        embed_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 1024,
        diversity_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if num_layers < 1 or num_scales < 1:
            raise ValueError(f"num_layers={num_layers} and num_scales={num_scales} must be at least 1")
        self.diversity_weight = _checked_weight(diversity_weight)
        self.positional_encoding = positional_encoding
        self.av_fusion = av_fusion
        self.num_scales = num_scales
        self.query = nn.Embedding(num_queries, embed_dim)
        self.visual_layers = nn.ModuleList(QueryLayer(embed_dim, num_heads, ffn_dim) for _ in range(num_layers))
        self.audio_layers = nn.ModuleList(QueryLayer(embed_dim, num_heads, ffn_dim) for _ in range(num_layers))
        self.query_gate = nn.Linear(embed_dim, embed_dim)
        self.audio_gate = nn.Linear(embed_dim, embed_dim)

    @property
    def couples_frames(self) -> bool:
        """By temporal A-V fusion, and in training by the diversity loss."""
        return _couples_frames(self.av_fusion) or (self.training and self.diversity_weight > 0)

    def forward(self, audio: Tensor, features: Sequence[Tensor], frame_mask: Tensor | None = None) -> GeneratedQueries:
        """Audio (N, A, C), features (N, C, H_l, W_l), frame mask (N,) -> queries (N, Q, C), audio tokens (N, A, C)."""
        audio_tokens = audio if self.av_fusion is None else self.av_fusion(audio, features, frame_mask)
        pixels = torch.cat([self._tokens(x) for x in features[-self.num_scales :]], dim=1)  # (N, L, C)
        queries = self.query.weight.expand(len(audio), -1, -1)
        for visual, auditory in zip(self.visual_layers, self.audio_layers, strict=True):
            queries = auditory(visual(queries, pixels), audio_tokens)
        heard = self.audio_gate(_one_token(audio))  # (N, 1, C)
        score = (self.query_gate(queries) * heard).sum(-1, keepdim=True) * queries.shape[-1] ** -0.5  # (N, Q, 1)
        loss = _weighted_diversity(self, queries, frame_mask)
        return GeneratedQueries(queries * score.sigmoid(), audio_tokens, loss)

    def _tokens(self, feature: Tensor) -> Tensor:
        """Pixels with their position, (N, H * W, C)."""
        position = self.positional_encoding(feature.shape[2], feature.shape[3], feature.device)
        return feature.flatten(2).transpose(1, 2) + position.to(feature.dtype)


def _weighted_diversity(generator: nn.Module, queries: Tensor, frame_mask: Tensor | None) -> Tensor | float:
    weight = float(generator.diversity_weight)  # type: ignore[arg-type]
    return weight * diversity_loss(queries, frame_mask) if weight and generator.training else 0.0


def _checked_weight(diversity_weight: float) -> float:
    if not isinstance(diversity_weight, int | float) or isinstance(diversity_weight, bool) or diversity_weight < 0:
        raise ValueError(f"diversity_weight={diversity_weight!r} must be a number, 0 or more")
    return float(diversity_weight)


def _couples_frames(av_fusion: nn.Module | None) -> bool:
    return av_fusion is not None and bool(getattr(av_fusion, "couples_frames", True))


def _one_token(audio: Tensor) -> Tensor:
    """The audio token (N, 1, C); the mean of several tokens per frame."""
    return audio if audio.shape[1] == 1 else audio.mean(dim=1, keepdim=True)
