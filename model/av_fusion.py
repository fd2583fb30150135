"""A-V fusion: the audio token attends to the pixels of each scale, before queries are decoded from it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.attention import MultiheadAttention
from model.layers.dropout import Dropout
from utils.registry import MODELS


class AudioVisualLayer(nn.Module):
    """Cross-attention from audio tokens to pixels, and a feed-forward block; both with residual and LayerNorm.

    Args:
        embed_dim: C.
        num_heads: attention heads.
        ffn_dim: width of the feed-forward block.
        dropout: rate, after each block and inside the feed-forward one.
    """

    def __init__(self, embed_dim: int, num_heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.cross_attn = MultiheadAttention(embed_dim, num_heads, bias=False, dropout=dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, audio: Tensor, pixels: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """Audio (N, A, C) and pixels (N, L, C), mask (N, L) -> audio (N, A, C)."""
        audio = self.norm1(audio + self.dropout(self.cross_attn(audio, pixels, pixel_mask)))
        hidden = self.dropout(F.relu(self.linear1(audio)))
        return self.norm2(audio + self.dropout(self.linear2(hidden)))


@MODELS.register_module()
class AVFusion(nn.Module):
    """One audio token per scale, fused with that scale's pixels by cross-attention.

    Args:
        embed_dim: C.
        num_heads: attention heads.
        ffn_dim: width of the feed-forward blocks.
        num_layers: scales, at most 4; the fourth is a stride-2 convolution of the third.
        temporal: attend to all frames of the clip except padded ones.
        num_frames: T, frames per clip; used by `temporal` only.
        dropout: see AudioVisualLayer.

    Raises:
        ValueError: `num_layers` is out of range.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 1024,
        num_layers: int = 3,
        temporal: bool = False,
        num_frames: int = 5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 1 <= num_layers <= 4:
            raise ValueError(f"AVFusion has 1 to 4 layers, one per scale; got num_layers={num_layers}")
        self.temporal = self.couples_frames = temporal
        self.num_frames = num_frames
        self.layers = nn.ModuleList(AudioVisualLayer(embed_dim, num_heads, ffn_dim, dropout) for _ in range(num_layers))
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(embed_dim, embed_dim, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(embed_dim)
            )
            if num_layers == 4
            else None
        )

    def forward(self, audio: Tensor, features: Sequence[Tensor], frame_mask: Tensor | None = None) -> Tensor:
        """Fuse audio with each scale.

        Args:
            audio: audio embedding of each frame (N, A, C), A = 1 for encoders with one embedding per frame.
            features: the scales, finest first, (N, C, H_l, W_l).
            frame_mask: (N,), 0 for padded frames; used by `temporal` only.

        Returns:
            Audio tokens (N, scales * A, C).

        Raises:
            ValueError: `temporal`, and N is not a multiple of T.
        """
        if self.downsample is not None:
            features = [*features, self.downsample(features[-1])]
        fused = []
        for layer, feature in zip(self.layers, features, strict=False):
            pixels = feature.flatten(2).transpose(1, 2)  # (N, H_l * W_l, C)
            if self.temporal:
                fused.append(self._over_clip(layer, audio, pixels, frame_mask))
            else:
                fused.append(layer(audio, pixels))
        return torch.cat(fused, dim=1)

    def _over_clip(self, layer: nn.Module, audio: Tensor, pixels: Tensor, frame_mask: Tensor | None) -> Tensor:
        frames, length, channels = pixels.shape
        if frames % self.num_frames:
            raise ValueError(
                f"temporal fusion needs whole clips: {frames} frames are not a multiple of T={self.num_frames}"
            )
        clips = frames // self.num_frames
        mask = None
        if frame_mask is not None:
            mask = frame_mask.bool().view(clips, self.num_frames).repeat_interleave(length, dim=1)  # (B, T * L)
        fused = layer(audio.reshape(clips, -1, channels), pixels.reshape(clips, -1, channels), mask)
        return fused.reshape(audio.shape)
