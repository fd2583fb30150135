"""A convolution of an enlarged map, without enlarging it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.layers.constants import made_once

TAPS = 3


def conv_of_upsampled(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """`conv2d(interpolate(x, scale_factor=scale, mode="bilinear"), weight, bias, padding=1)`, in fewer operations.

    Enlarging works on rows and columns, the matrix of each of the convolution's 3 x 3 taps on channels, so that they
    may change places: the C channels become O before they are enlarged. Rows and columns are then enlarged, shifted by
    their tap and added up by one matrix each. With the products of the taps arranged as a matrix y of 3 H x 3 W for
    each output channel, the answer is `rows @ y @ columns.T`.

    These two are dense, as large matrix products run best: their part grows with H + W, and where it outgrows the
    convolution, that is done instead.

    Args:
        x: (N, C, H, W).
        weight: (O, C, 3, 3).
        bias: (O,).
        scale: s, by which the map is enlarged.

    Returns:
        (N, O, s * H, s * W).
    """
    n, channels, height, width = x.shape
    if not _products_pay(channels, height, width, scale):
        fine = F.interpolate(x, scale_factor=scale, mode="bilinear")
        return F.conv2d(fine, weight, bias, padding=1)
    out = weight.shape[0]
    rows, columns = (_matrix(length, scale, x.dtype, x.device) for length in (height, width))
    products = weight.permute(0, 2, 3, 1).flatten(0, 2) @ x.flatten(2)  # (N, O * 3 * 3, H * W)
    y = products.view(n, out, TAPS, TAPS, height, width).transpose(3, 4).reshape(n * out, TAPS * height, TAPS * width)
    fine = torch.bmm(rows.expand(n * out, -1, -1), y) @ columns.T  # (N * O, s * H, s * W)
    fine = fine.unflatten(0, (n, out))
    return fine if bias is None else fine + bias.to(fine.dtype)[:, None, None]  # autocast rounds products alone


def _products_pay(channels: int, height: int, width: int, scale: float) -> bool:
    """Whether they take fewer multiplications, each by O, than the convolution of the enlarged map."""
    taps = TAPS**2 * height * width
    products = taps * channels + taps * scale * height + TAPS * (scale * width) ** 2 * height
    return products < taps * scale**2 * channels


@made_once
def _matrix(length: int, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Enlargement of a row and its shifts by -1, 0 and 1 pixels, side by side: (s * length, 3 * length)."""
    unit = torch.eye(length, dtype=torch.promote_types(dtype, torch.float32), device=device)
    enlarged = F.interpolate(unit[None], scale_factor=scale, mode="linear")[0].T  # (s * length, length)
    padded = F.pad(enlarged, (0, 0, 1, 1))  # beyond the border the convolution sees zeros
    return torch.cat([padded[tap : tap + len(enlarged)] for tap in range(TAPS)], dim=1).to(dtype)
