"""The palette of AVSS label images: class indices from colours by a lookup table, and back."""

import functools

import numpy as np
import numpy.typing as npt

_UNKNOWN = 255
MAX_CLASSES = 255


@functools.cache
def palette(num_classes: int = 71) -> npt.NDArray[np.uint8]:
    """Pascal VOC's colour map, which AVSS uses: (num_classes, 3) uint8, class 0 (background) black.

    Bit k of the class index sets bit 7 - k // 3 of channel k % 3 (red, green, blue).

    Raises:
        ValueError: `num_classes` is not in 1..255.
    """
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"a label image holds 1 to {MAX_CLASSES} classes, got {num_classes}")
    classes = np.arange(num_classes)
    colours = np.zeros((num_classes, 3), np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= (((classes >> bit) & 1) << (7 - bit // 3)).astype(np.uint8)
    colours.setflags(write=False)
    return colours


def decode(colours: npt.NDArray[np.uint8], num_classes: int = 71) -> npt.NDArray[np.uint8]:
    """Class indices of a label image.

    Args:
        colours: (H, W, 3) uint8.
        num_classes: number of colours of the palette that may occur.

    Returns:
        (H, W) uint8 class indices.

    Raises:
        UnknownColourError: a pixel has another colour.
    """
    classes = _table(num_classes)[_pack(colours)]
    if classes.max(initial=0) == _UNKNOWN:
        row, column = np.argwhere(classes == _UNKNOWN)[0]
        red, green, blue = (int(value) for value in colours[row, column])
        raise UnknownColourError((red, green, blue), (int(row), int(column)))
    return classes


def encode(classes: npt.NDArray[np.uint8], num_classes: int = 71) -> npt.NDArray[np.uint8]:
    """Label image (..., 3) uint8 of class indices (...)."""
    return palette(num_classes)[classes]


class UnknownColourError(ValueError):
    """A label image has a colour outside the palette."""

    def __init__(self, colour: tuple[int, int, int], position: tuple[int, int]) -> None:
        """Colour as (red, green, blue), position as (row, column)."""
        self.colour = colour
        self.position = position
        super().__init__(f"colour {colour} at row {position[0]}, column {position[1]} is not in the palette")


def _pack(colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    packed = colours[..., 0].astype(np.intp)
    for channel in (1, 2):
        packed <<= 8
        packed |= colours[..., channel]
    return packed


@functools.cache
def _table(num_classes: int) -> npt.NDArray[np.uint8]:
    """(2^24,) uint8: the class of every 24-bit colour, 16 MB."""
    table = np.full(1 << 24, _UNKNOWN, np.uint8)
    table[_pack(palette(num_classes))] = np.arange(num_classes, dtype=np.uint8)
    return table
