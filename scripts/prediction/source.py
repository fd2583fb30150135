"""What pictures with sound are to `predict`: the interface of videos (`video.py`) and of pictures (`pictures.py`).

Time 0 is the first picture. Pictures and sound are generators, so that memory does not grow with the length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import av
import numpy as np
import numpy.typing as npt

from utils.errors import DataError

MAX_SIDE = 16_384  # pixels, the limit of H.264
MAX_PIXELS = 36_000_000  # 8K has 33,177,600

Sound = npt.NDArray[np.float32]


class Orientation(NamedTuple):
    """Turns and mirrors a stored picture upright: first swaps its axes, then flips columns, then rows."""

    swap: bool = False
    flip_x: bool = False
    flip_y: bool = False

    def apply(self, picture: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Picture (H, W, ...) -> upright, a view."""
        picture = picture.swapaxes(0, 1) if self.swap else picture
        return picture[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Upright (width, height)."""
        return (height, width) if self.swap else (width, height)


@dataclass(frozen=True)
class Frame:
    """A picture as it is stored.

    Attributes:
        time: seconds from the first picture.
        duration: seconds.
        picture: not yet upright.
    """

    time: float
    duration: float
    picture: av.VideoFrame


@dataclass
class Damage:
    """The first fault of a file, and where it is."""

    message: str = ""

    def note(self, message: str) -> None:
        """Keep the first message."""
        self.message = self.message or message


@dataclass(frozen=True)
class SoundFile:
    """A sound and its clock.

    Attributes:
        path: of the file.
        index: of the stream among the sounds of the file.
        zero: time of the file's clock at which the first picture is shown, seconds.
        rate: Hz.
        own: the sound track of the video; another sound is cut at the video's end.
    """

    path: Path
    index: int
    zero: float
    rate: int
    own: bool


class Source(Protocol):
    """Pictures with sound.

    Attributes:
        path: of the file or folder.
        width, height: upright, pixels.
        rate: pictures per second, on average.
        duration: seconds; None where unknown.
        orientation: of the stored pictures.
        aspect: width of a stored pixel over its height.
        sound_file: None: silence.
        damage: what was wrong, filled while reading.
    """

    path: Path
    width: int
    height: int
    rate: float
    duration: float | None
    orientation: Orientation
    aspect: float
    sound_file: SoundFile | None
    damage: Damage

    def frames(self) -> Iterator[Frame]:
        """All pictures, in order."""
        ...

    def sound(self) -> Iterator[Sound]:
        """The sound from time 0 on, in pieces (n,) of full scale 1, channels averaged; none without a sound."""
        ...

    def check_end(self, pictures_end: float, sound_end: float) -> None:
        """Note damage if both end before the header says so, seconds."""
        ...


def check_size(width: int, height: int, path: Path) -> None:
    """Raise DataError for pictures above the limits."""
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise DataError(
            f"{path} has pictures of {width} x {height} pixels; the limits are {MAX_SIDE:,} per side and "
            f"{MAX_PIXELS:,} together."
        )
