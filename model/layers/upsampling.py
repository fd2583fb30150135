"""A 3 x 3 convolution of a bilinearly upsampled map, computed at the coarse resolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.layers.constants import cached_constant

TAPS = 3


def conv_of_upsampled(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`conv2d(interpolate(x, scale_factor=scale, mode="bilinear"), weight, bias, padding=1)`, in fewer operations.

    Upsampling acts on rows and columns, each of the 3 x 3 taps on channels, so the two commute: the taps first reduce C
    channels to O, on the coarse map. Upsampling, shift and sum over taps are then one matrix per axis. With the taps'
    products of one output channel arranged as a matrix y of 3 H x 3 W, the result is `rows @ y @ columns.T`.

    The two matrices are dense. Their cost grows with H + W; where it exceeds that of the plain convolution, the plain
    convolution is used.

    Args:
        x: (N, C, H, W).
        weight: (O, C, 3, 3).
        bias: (O,), or None.
        scale: s, the upsampling factor.

    Returns:
        (N, O, s * H, s * W).
    """
    n, channels, height, width = x.shape
    if not _taps_first(channels, height, width, scale):
        fine = F.interpolate(x, scale_factor=scale, mode="bilinear")
        return F.conv2d(fine, weight, bias, padding=1)
    out = weight.shape[0]
    rows, columns = (_upsampling_matrix(length, scale, x.dtype, x.device) for length in (height, width))
    products = weight.permute(0, 2, 3, 1).flatten(0, 2) @ x.flatten(2)  # (N, O * 3 * 3, H * W)
    y = products.view(n, out, TAPS, TAPS, height, width).transpose(3, 4).reshape(n * out, TAPS * height, TAPS * width)
    fine = torch.bmm(rows.expand(n * out, -1, -1), y) @ columns.T  # (N * O, s * H, s * W)
    fine = fine.unflatten(0, (n, out))
    return fine if bias is None else fine + bias.to(fine.dtype)[:, None, None]  # autocast casts matmul inputs only


def _taps_first(channels: int, height: int, width: int, scale: float) -> bool:
    """Whether the matrices take fewer multiplications (per output channel) than convolving the upsampled map."""
    taps = TAPS**2 * height * width
    matrices = taps * channels + taps * scale * height + TAPS * (scale * width) ** 2 * height
    return matrices < taps * scale**2 * channels


@cached_constant
def _upsampling_matrix(length: int, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Upsampling of one axis, shifted by -1, 0 and 1 pixels, side by side: (s * length, 3 * length)."""
    unit = torch.eye(length, dtype=torch.promote_types(dtype, torch.float32), device=device)
    upsampled = F.interpolate(unit[None], scale_factor=scale, mode="linear")[0].T  # (s * length, length)
    padded = F.pad(upsampled, (0, 0, 1, 1))  # zero padding of the convolution
    return torch.cat([padded[tap : tap + len(upsampled)] for tap in range(TAPS)], dim=1).to(dtype)
