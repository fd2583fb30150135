"""Sine positional encodings and reference points."""

import math

import torch
from torch import Tensor, nn

from model.layers.constants import cached_constant
from utils.registry import MODELS

SpatialShapes = tuple[tuple[int, int], ...]


@MODELS.register_module()
class SinePositionalEncoding(nn.Module):
    """Sines and cosines of a pixel's row and column (DETR, Carion et al., 2020), not learned.

    Args:
        num_feats: features per axis; a pixel has `2 * num_feats`, rows before columns.
        temperature: ratio of the longest to the shortest wavelength.
        normalize: scale positions to (0, `scale`] instead of counting pixels.
        scale: see `normalize`.
    """

    def __init__(
        self,
        num_feats: int = 128,
        temperature: float = 10000.0,
        normalize: bool = False,
        scale: float = 2 * math.pi,
    ) -> None:
        super().__init__()
        self.num_feats = num_feats
        self.temperature = temperature
        self.normalize = normalize
        self.scale = scale

    def forward(self, height: int, width: int, device: torch.device) -> Tensor:
        """Encode the pixels of an H x W map, row by row: (H * W, 2 * num_feats), float32."""
        scale = self.scale if self.normalize else None
        return _sine_tokens(height, width, self.num_feats, self.temperature, scale, device)


@cached_constant
def reference_points(shapes: SpatialShapes, device: torch.device) -> Tensor:
    """Pixel centres (x, y) in [0, 1], level by level, row by row: (L, 2), float32."""
    levels = []
    for height, width in shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        levels.append(torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1))
    return torch.cat(levels)


@cached_constant
def _sine_tokens(
    height: int, width: int, num_feats: int, temperature: float, scale: float | None, device: torch.device
) -> Tensor:
    rows = _axis(height, num_feats, temperature, scale, device)  # (H, F)
    columns = _axis(width, num_feats, temperature, scale, device)  # (W, F)
    grid = torch.cat(
        (rows[:, None].expand(height, width, num_feats), columns[None].expand(height, width, num_feats)), dim=-1
    )
    return grid.reshape(height * width, 2 * num_feats)


def _axis(length: int, num_feats: int, temperature: float, scale: float | None, device: torch.device) -> Tensor:
    position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
    if scale is not None:
        position = position / (length + 1e-6) * scale
    exponent = torch.arange(num_feats, dtype=torch.float32, device=device).div(2, rounding_mode="floor") * 2 / num_feats
    angle = position[:, None] / temperature**exponent  # (length, F), wavelengths in pairs
    return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1)
