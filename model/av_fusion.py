"""Audio-visual fusion ('MTA'): the sound looks at the picture, at each scale, before queries are made of it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.attention import MultiheadAttention
from model.layers.dropout import Dropout
from utils.registry import AV_FUSIONS


class AudioVisualLayer(nn.Module):
    """Cross-attention from audio tokens to pixels, and a feed-forward block; both with residual and LayerNorm.

    Args:
        embed_dim: C.
        num_heads: attention heads.
        hidden_dim: width of the feed-forward block.
        dropout: after each block and inside the feed-forward one.
    """

    def __init__(self, embed_dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.cross_attn = MultiheadAttention(embed_dim, num_heads, bias=False, dropout=dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.linear1 = nn.Linear(embed_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, audio: Tensor, pixels: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """Audio (N, A, C) and pixels (N, L, C), mask (N, L) -> audio (N, A, C)."""
        audio = self.norm1(audio + self.dropout(self.cross_attn(audio, pixels, pixel_mask)))
        hidden = self.dropout(F.relu(self.linear1(audio)))
        return self.norm2(audio + self.dropout(self.linear2(hidden)))


@AV_FUSIONS.register_module()
class MTA(nn.Module):
    """One audio token a scale, each informed by that scale's pixels.

    Args:
        embed_dim: C.
        num_heads: attention heads.
        hidden_dim: width of the feed-forward blocks.
        num_layers: scales, at most 4; the fourth is a stride-2 convolution of the third.
        temporal: let each frame's sound look at all frames of its clip, padded ones excepted.
        num_frames: T, frames a clip; used by `temporal` alone.
        dropout: see AudioVisualLayer.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        hidden_dim: int = 1024,
        num_layers: int = 3,
        temporal: bool = False,
        num_frames: int = 5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 1 <= num_layers <= 4:
            raise ValueError(f"MTA has 1 to 4 layers, one a scale; got num_layers={num_layers}")
        self.temporal = self.frames_share = temporal
        self.num_frames = num_frames
        self.layers = nn.ModuleList(
            AudioVisualLayer(embed_dim, num_heads, hidden_dim, dropout) for _ in range(num_layers)
        )
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(embed_dim, embed_dim, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(embed_dim)
            )
            if num_layers == 4
            else None
        )

    def forward(self, audio: Tensor, features: Sequence[Tensor], frame_mask: Tensor | None = None) -> Tensor:
        """Look at each scale.

        Args:
            audio: the sound of each frame (N, 1, C).
            features: the scales, finest first, (N, C, H_l, W_l).
            frame_mask: (N,), 0 where a frame is padding; used by `temporal` alone.

        Returns:
            (N, scales, C).

        Raises:
            ValueError: `temporal`, and N is no multiple of T.
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
                f"temporal fusion needs whole clips: {frames} frames are no multiple of T={self.num_frames}"
            )
        clips = frames // self.num_frames
        mask = None
        if frame_mask is not None:
            mask = frame_mask.bool().view(clips, self.num_frames).repeat_interleave(length, dim=1)  # (B, T * L)
        fused = layer(audio.reshape(clips, self.num_frames, channels), pixels.reshape(clips, -1, channels), mask)
        return fused.reshape(frames, 1, channels)
