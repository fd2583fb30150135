"""Where a pixel is: sine position encodings and reference points."""

import math

import torch
from torch import Tensor, nn

from model.layers.constants import made_once
from utils.registry import POSITIONAL_ENCODINGS

SpatialShapes = tuple[tuple[int, int], ...]


@POSITIONAL_ENCODINGS.register_module()
class SinePositionalEncoding(nn.Module):
    """Sines and cosines of a pixel's row and column (Carion et al., 2020), not learned.

    Args:
        num_feats: features an axis; a pixel gets `2 * num_feats` of them, rows before columns.
        temperature: ratio between the longest and the shortest wave length.
        normalize: measure positions in `scale` per picture instead of in pixels.
        scale: only with `normalize`.
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
        """The encoding of each pixel of an H x W map as tokens (H * W, 2 * num_feats), float32, row by row."""
        scale = self.scale if self.normalize else None
        return _sine_tokens(height, width, self.num_feats, self.temperature, scale, device)


@made_once
def reference_points(shapes: SpatialShapes, device: torch.device) -> Tensor:
    """The centre of each pixel of each level as (L, 2) x, y in [0, 1], float32, level by level, row by row."""
    levels = []
    for height, width in shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        levels.append(torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1))
    return torch.cat(levels)


@made_once
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
    angle = position[:, None] / temperature**exponent  # (length, F): a sine and a cosine share each wave length
    return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1)
