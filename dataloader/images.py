"""Safe reading, resizing and normalisation of frames and masks."""

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
# Raised by Pillow on damaged files (its own tests, and fuzzing).
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


def open_image(path: str | Path, what: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a PNG or JPEG whole, after checking its header.

    Args:
        path: the file.
        what: 'frame' or 'mask', for messages.
        max_pixels: largest width x height accepted.

    Raises:
        DataError: the file is missing, unreadable, truncated, of another format, or larger than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is checked below
            image = Image.open(path, formats=_FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            image.close()
            raise Image.DecompressionBombError(f"{width} x {height}")
        image.load()
    except FileNotFoundError as error:
        raise DataError(f"the {what} {path} is missing.") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"the {what} {path} has more than {max_pixels:,} pixels, the limit.") from error
    except Image.UnidentifiedImageError as error:
        raise DataError(f"the {what} {path} is neither a PNG nor a JPEG.") from error
    except _DECODER_ERRORS as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"the {what} {path} cannot be read ({reason}): it is damaged or truncated.") from error
    return image


def read_frame(path: str | Path, size: "Placement") -> npt.NDArray[np.uint8]:
    """A video frame (H, W, 3) uint8, resized bilinearly to `size`."""
    image = open_image(path, "frame")
    image = image if image.mode == "RGB" else image.convert("RGB")
    return np.asarray(size.apply(image, Image.Resampling.BILINEAR))


def read_binary_mask(path: str | Path, size: "Placement") -> npt.NDArray[np.uint8]:
    """A binary mask (H, W) uint8, 1 = any pixel that is not black, resized to `size` by nearest neighbour."""
    image = open_image(path, "mask")
    if image.mode in ("P", "PA", "RGBA", "CMYK", "YCbCr"):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    if image.mode == "LA":
        pixels = pixels[..., 0]
    inside = (pixels != 0) if pixels.ndim == 2 else (pixels != 0).any(axis=-1)
    return np.asarray(size.apply(Image.fromarray(inside.astype(np.uint8)), Image.Resampling.NEAREST))


def read_colour_mask(path: str | Path, size: "Placement", num_classes: int) -> npt.NDArray[np.uint8]:
    """An AVSS label image as class indices (H, W) uint8, resized to `size` by nearest neighbour.

    Index PNGs are read as they are: grey images (mode L), and images with AVSS's palette (mode P). Others are decoded
    from their colours.

    Raises:
        DataError: unreadable, or a colour or index outside the palette.
    """
    image = open_image(path, "mask")
    if image.mode == "L" or (image.mode == "P" and _has_class_palette(image)):
        classes = np.array(size.apply(image, Image.Resampling.NEAREST))
        if classes.max(initial=0) >= num_classes:
            raise DataError(f"the mask {path} has the class {classes.max()}, but num_classes={num_classes}.")
        return classes
    image = size.apply(image.convert("RGB"), Image.Resampling.NEAREST)
    try:
        return palette.decode(np.asarray(image), num_classes)
    except palette.UnknownColourError as error:
        raise DataError(
            f"the mask {path} has the colour {error.colour}, which is not in the palette of {num_classes} classes."
        ) from error


def _has_class_palette(image: Image.Image) -> bool:
    """Whether a palette image's colours are those of its indices in AVSS."""
    colours = np.asarray(image.getpalette() or [], np.uint8).reshape(-1, 3)[: palette.MAX_CLASSES]
    return len(colours) > 0 and np.array_equal(colours, palette.palette(palette.MAX_CLASSES)[: len(colours)])


class Placement:
    """Resizing of an image to a fixed size.

    Args:
        height: of the result, pixels.
        width: of the result, pixels.
        crop: False: stretch to height x width. True: resize the shorter side, keep the aspect, take the centre.
    """

    def __init__(self, height: int, width: int, *, crop: bool = False) -> None:
        """See the class."""
        self.height, self.width, self.crop = height, width, crop

    def apply(self, image: Image.Image, resampling: Image.Resampling) -> Image.Image:
        """The image at (height, width); the image itself if it has that size."""
        if image.size == (self.width, self.height):
            return image
        if not self.crop:
            return image.resize((self.width, self.height), resampling)
        scale = max(self.width / image.width, self.height / image.height)
        width = max(self.width, round(image.width * scale))
        height = max(self.height, round(image.height * scale))
        image = image.resize((width, height), resampling)
        left, top = (width - self.width) // 2, (height - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))


def normalise(frames: npt.NDArray[np.uint8]) -> Tensor:
    """(T, H, W, 3) uint8, writable -> (T, 3, H, W) float32 with ImageNet's mean and deviation."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.sub_(_scaled(IMAGENET_MEAN)).div_(_scaled(IMAGENET_STD))


def _scaled(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1) * 255.0
