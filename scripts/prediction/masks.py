"""Masks at the size of the video: images, tints of an overlay, pictures with alpha."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dataloader.palette import palette
from scripts.prediction.model import Planes
from utils.files import atomic_path

OBJECT_COLOUR = (255, 140, 0)  # as scripts/engine/visualize.py
OPACITY = 0.6
SOFT = 0.1  # of the probability, on both sides of the threshold
Image8 = npt.NDArray[np.uint8]
RGB = tuple[int, int, int]


def enlarged(mask: Planes, width: int, height: int) -> list[Image8]:
    """A mask (P, h, w) at (height, width): the probability bilinearly, the class by nearest neighbour."""
    methods = (Image.Resampling.BILINEAR, Image.Resampling.NEAREST)
    return [
        np.asarray(Image.fromarray(plane).resize((width, height), method))
        for plane, method in zip(mask, methods, strict=False)
    ]


def blended(before: Planes, after: Planes, share: float) -> Planes:
    """The mask between two: probabilities linearly, classes of the nearer one."""
    probability = (1 - share) * before[:1].astype(np.float32) + share * after[:1].astype(np.float32)
    classes = (after if share > 0.5 else before)[1:]
    return np.concatenate([probability.round().astype(np.uint8), classes])


def save_mask(path: Path, mask: Planes, width: int, height: int, threshold: float) -> None:
    """Write a mask (P, h, w) as PNG: probability * 255; with classes their indices, in the colours of AVSS."""
    planes = enlarged(mask, width, height)
    image = Image.fromarray(planes[0])
    if len(planes) == 2:
        image = Image.fromarray(np.where(planes[0] > threshold * 255, planes[1], 0).astype(np.uint8))
        image.putpalette(palette(256 - 1).tobytes())
    with atomic_path(path, durable=False) as part:
        image.save(part, format="PNG", compress_level=1)


def areas(mask: Planes, threshold: float) -> tuple[float, dict[int, float]]:
    """Painted share of the picture, and per class index, of a mask (P, h, w)."""
    painted = mask[0] > threshold * 255
    share = float(painted.mean())
    if len(mask) == 1:
        return share, {}
    counts = np.bincount(mask[1][painted], minlength=1)
    return share, {index: float(counts[index] / painted.size) for index in np.flatnonzero(counts).tolist()}


def class_colour(index: int) -> RGB:
    """Red, green and blue of a class, as AVSS draws it."""
    red, green, blue = (int(value) for value in palette(255)[index])
    return red, green, blue


def opacity_table(threshold: float) -> npt.NDArray[np.int16]:
    """(256,): opacity from 0 to 256 of each probability * 255; it rises smoothly around the threshold."""
    probability = np.arange(256) / 255
    rise = np.clip((probability - threshold) / (2 * SOFT) + 0.5, 0, 1)
    return np.round(256 * OPACITY * rise * rise * (3 - 2 * rise)).astype(np.int16)


def colours(mask: list[Image8], colour: RGB | None = None) -> npt.NDArray[np.int16]:
    """Colour of the mask as (3,) or, with classes, (3, H, W): Y, U, V of BT.601, from 0 to 255.

    `colour` replaces those of the classes.
    """
    if colour is not None:
        mask = mask[:1]
    rgb = np.asarray(palette(255) if len(mask) == 2 else [colour or OBJECT_COLOUR], np.float32)  # (K, 3)
    yuv = rgb @ _RGB_TO_YUV.T + np.array([16, 128, 128], np.float32)
    table = yuv.round().astype(np.int16)
    return table[0] if len(mask) == 1 else table[np.minimum(mask[1], len(table) - 1)].transpose(2, 0, 1)


@dataclass(frozen=True)
class Tint:
    """A mask prepared for pictures in planes of YUV 4:2:0; applied to many of them.

    Attributes:
        box: top, bottom, left, right of what is painted, even numbers; None: nothing.
        opacity: of the box at full and at half resolution, 0 to 256.
        colour: Y, U and V, numbers or arrays of the box.
    """

    box: tuple[int, int, int, int] | None
    opacity: tuple[npt.NDArray[np.int16], ...] = ()
    colour: tuple[npt.NDArray[np.int16], ...] = ()

    @classmethod
    def of(cls, mask: Planes, width: int, height: int, threshold: float, colour: RGB | None = None) -> "Tint":
        """The tint of a mask (P, h, w) for pictures of an even size, pixels; by default in the colours of classes."""
        planes = enlarged(mask, width, height)
        opacity = opacity_table(threshold)[planes[0]]
        rows, columns = np.flatnonzero(opacity.any(axis=1)), np.flatnonzero(opacity.any(axis=0))
        if not len(rows):
            return cls(None)
        top, left = rows[0] // 2 * 2, columns[0] // 2 * 2
        bottom, right = rows[-1] // 2 * 2 + 2, columns[-1] // 2 * 2 + 2
        area = np.s_[top:bottom, left:right]
        full = opacity[area]
        half = (full[::2, ::2] + full[1::2, ::2] + full[::2, 1::2] + full[1::2, 1::2]) // 4
        yuv = colours([plane[area] for plane in planes], colour)
        parts = tuple(yuv) if yuv.ndim == 1 else (yuv[0], yuv[1][::2, ::2], yuv[2][::2, ::2])
        return cls((int(top), int(bottom), int(left), int(right)), (full, half, half), parts)

    def apply(self, planes: tuple[Image8, Image8, Image8]) -> None:
        """Paint into Y (H, W), U and V (H/2, W/2), in place."""
        if self.box is None:
            return
        top, bottom, left, right = self.box
        for index, plane in enumerate(planes):
            scale = 1 if index == 0 else 2
            part = plane[top // scale : bottom // scale, left // scale : right // scale]
            change = (self.colour[index] - part.astype(np.int16)).astype(np.int32) * self.opacity[index]
            part += (change >> 8).astype(np.int16).astype(np.uint8)  # modulo 256, as the sum is


def with_alpha(mask: Planes, width: int, height: int) -> Image8:
    """(height, width, 4) RGBA: the mask's colour, with the probability as alpha."""
    planes = enlarged(mask, width, height)
    out = np.empty((height, width, 4), np.uint8)
    out[..., :3] = OBJECT_COLOUR if len(planes) == 1 else palette(255)[np.minimum(planes[1], 254)]
    out[..., 3] = planes[0]
    return out


_RGB_TO_YUV = np.array(
    [[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]], np.float32
) / np.float32(255)
"""ITU-R BT.601, limited range."""
