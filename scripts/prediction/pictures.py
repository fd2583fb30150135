"""A folder of pictures, or a single picture, with a sound file; the same interface as a video (`source.Source`)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from dataloader.images import open_image
from scripts.prediction.media import open_sound, read_sound, sound_length
from scripts.prediction.source import MAX_PIXELS, Damage, Frame, Orientation, Sound, SoundFile, check_size
from utils.errors import DataError

PICTURES = (".png", ".jpg", ".jpeg")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".aac", ".opus")
MIN_RATE = 10.0
"""Pictures per second of the overlay at least: a picture that stays longer is repeated, so that the cursor moves."""
MAX_STILL = 3600.0  # seconds of a single picture


@dataclass
class Pictures:
    """Pictures in the order of their names; see `source.Source`. Made by `open_pictures`.

    All are brought to the size of the first.
    """

    path: Path
    files: list[Path]
    width: int
    height: int
    rate: float
    repeat: int
    duration: float | None
    sound_file: SoundFile | None
    orientation: Orientation = field(default_factory=Orientation)
    aspect: float = 1.0
    damage: Damage = field(default_factory=Damage)

    def frames(self) -> Iterator[Frame]:
        """See source.Source."""
        count = max(1, round((self.duration or 0.0) * self.rate))
        picture: av.VideoFrame | None = None
        shown = -1
        for index in range(count):
            file = min(index // self.repeat, len(self.files) - 1)
            if file != shown:
                try:
                    picture, shown = self._read(self.files[file]), file
                except DataError as error:
                    self.damage.note(f"at {index / self.rate:.2f} s: {error}")
                    return
            assert picture is not None
            yield Frame(index / self.rate, 1 / self.rate, picture)

    def sound(self) -> Iterator[Sound]:
        """See source.Source."""
        if self.sound_file is not None:
            yield from read_sound(self.sound_file, self.damage)

    def check_end(self, pictures_end: float, sound_end: float) -> None:
        """Pictures have no header that states their number."""

    def _read(self, path: Path) -> av.VideoFrame:
        image = upright(path).resize((self.width, self.height), Image.Resampling.BILINEAR)
        return av.VideoFrame.from_ndarray(np.asarray(image), "rgb24")


def open_pictures(path: Path, *, silent: bool, sound: Path | None, fps_in: float) -> Pictures:
    """A folder of PNG or JPEG files, or one such file.

    Args:
        path: of the folder or picture.
        silent: continue with silence where there is no sound.
        sound: the sound; for a folder the only sound file in it by default.
        fps_in: pictures per second; a single picture stays for the length of the sound.

    Raises:
        DataError: no pictures, no sound, or several sounds.
    """
    files = [path] if path.is_file() else sorted((p for p in path.iterdir() if p.suffix.lower() in PICTURES), key=order)
    if not files:
        raise DataError(f"{path} holds no pictures ({', '.join(PICTURES)}).")
    if sound is None and path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SOUNDS)
        if len(found) > 1:
            raise DataError(f"{path} holds {len(found)} sounds: name one of them with --sound FILE.")
        sound = found[0] if found else None
    if sound is None and not silent:
        raise DataError(f"{path} has no sound: name one with --sound FILE, or go on with silence with --silent.")
    track = open_sound(sound) if sound is not None else None
    repeat = max(1, int(np.ceil(MIN_RATE / fps_in)))
    duration = len(files) / fps_in
    if path.is_file() and sound is not None:
        duration = min(max(sound_length(sound), 1 / fps_in), MAX_STILL)
    first = upright(files[0])
    check_size(first.width, first.height, files[0])
    rate = float(Fraction(fps_in).limit_denominator(1000) * repeat)
    return Pictures(path, files, first.width, first.height, rate, repeat, duration, track)


def upright(path: Path) -> Image.Image:
    """An image as RGB, turned as its EXIF says."""
    return ImageOps.exif_transpose(open_image(path, "picture", max_pixels=MAX_PIXELS)).convert("RGB")


def order(path: Path) -> list[tuple[int, str]]:
    """Sorts names as people do: 2.png before 10.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]
