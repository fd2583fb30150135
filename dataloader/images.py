"""Frames and masks: safe reading, resizing, normalising."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dataloader import palette
from utils.errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 64_000_000
_FORMATS = ("PNG", "JPEG")
# What Pillow raises on damaged files, by its own tests and by fuzzing.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    ZeroDivisionError,
)


def open_picture(path: str | Path, what: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a PNG or JPEG whole, once its header has been found believable.

    Args:
        path: the file.
        what: 'frame' or 'mask', for messages.
        max_pixels: largest width x height that is decoded.

    Raises:
        DataError: the file is missing, unreadable, truncated, of another format, or larger than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            picture = Image.open(path, formats=_FORMATS)
        width, height = picture.size
        if width * height > max_pixels:
            picture.close()
            raise Image.DecompressionBombError(f"{width} x {height}")
        picture.load()
    except FileNotFoundError as error:
        raise DataError(f"the {what} {path} is missing.") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"the {what} {path} has more than the {max_pixels:,} pixels that are allowed.") from error
    except Image.UnidentifiedImageError as error:
        raise DataError(f"the {what} {path} is neither a PNG nor a JPEG picture.") from error
    except _DECODER_ERRORS as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"the {what} {path} cannot be read ({reason}): it is damaged or truncated.") from error
    return picture


def read_frame(path: str | Path, size: "Placement") -> npt.NDArray[np.uint8]:
    """A video frame at the size of the run: (H, W, 3) uint8, resized bilinearly where it has another size."""
    picture = open_picture(path, "frame")
    picture = picture if picture.mode == "RGB" else picture.convert("RGB")
    return np.asarray(size.apply(picture, Image.Resampling.BILINEAR))


def read_binary_mask(path: str | Path, size: "Placement") -> npt.NDArray[np.uint8]:
    """A mask in which any pixel that is not black is object: (H, W) uint8 of 0 and 1."""
    picture = open_picture(path, "mask")
    if picture.mode in ("P", "PA", "RGBA", "CMYK", "YCbCr"):
        picture = picture.convert("RGB")
    pixels = np.asarray(picture)
    if picture.mode == "LA":
        pixels = pixels[..., 0]
    inside = (pixels != 0) if pixels.ndim == 2 else (pixels != 0).any(axis=-1)
    return np.asarray(size.apply(Image.fromarray(inside.astype(np.uint8)), Image.Resampling.NEAREST))


def read_colour_mask(path: str | Path, size: "Placement", num_classes: int) -> npt.NDArray[np.uint8]:
    """An AVSS label picture: (H, W) uint8 class numbers.

    Raises:
        DataError: unreadable, or a colour outside the palette.
    """
    picture = open_picture(path, "mask").convert("RGB")
    picture = size.apply(picture, Image.Resampling.NEAREST)
    try:
        return palette.decode(np.asarray(picture), num_classes)
    except palette.UnknownColourError as error:
        raise DataError(
            f"the mask {path} has the colour {error.colour}, which is not one of the {num_classes} classes' colours."
        ) from error


class Placement:
    """How a picture of any size comes to the size of the run.

    Args:
        height: of the result, pixels.
        width: of the result, pixels.
        crop: False: stretch to height x width. True: resize the shorter side, keep the aspect, take the centre.
    """

    def __init__(self, height: int, width: int, *, crop: bool = False) -> None:
        """See the class."""
        self.height, self.width, self.crop = height, width, crop

    def apply(self, picture: Image.Image, resampling: Image.Resampling) -> Image.Image:
        """The picture at (height, width); itself where it already fits."""
        if picture.size == (self.width, self.height):
            return picture
        if not self.crop:
            return picture.resize((self.width, self.height), resampling)
        scale = max(self.width / picture.width, self.height / picture.height)
        width = max(self.width, round(picture.width * scale))
        height = max(self.height, round(picture.height * scale))
        picture = picture.resize((width, height), resampling)
        left, top = (width - self.width) // 2, (height - self.height) // 2
        return picture.crop((left, top, left + self.width, top + self.height))


def normalise(frames: npt.NDArray[np.uint8]) -> Tensor:
    """(T, H, W, 3) uint8, writable -> (T, 3, H, W) float32 with ImageNet's mean and deviation."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.sub_(_scaled(IMAGENET_MEAN)).div_(_scaled(IMAGENET_STD))


def _scaled(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1) * 255.0
