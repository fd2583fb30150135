"""Video files as sources: pictures, their orientation and times, and where the sound is."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np

from scripts.prediction.media import JUMP, decode, open_media, open_sound, read_sound, sound_rate
from scripts.prediction.source import (
    MAX_PIXELS,
    MAX_SIDE,
    Damage,
    Frame,
    Orientation,
    Sound,
    SoundFile,
    check_size,
)
from utils.errors import DataError

MISSING_END = 0.5  # seconds; a file that ends this much before its header says is truncated
WITH_LENGTH = ("mov", "matroska", "avi", "asf", "flv")
"""Containers whose header states the length."""


@dataclass
class VideoFile:
    """A video file; see Source. Made by `open_video`."""

    path: Path
    width: int
    height: int
    rate: float
    duration: float | None
    orientation: Orientation
    aspect: float
    sound_file: SoundFile | None
    zero: float
    announced: float | None
    damage: Damage = field(default_factory=Damage)

    def frames(self) -> Iterator[Frame]:
        """See Source."""
        step = 1 / self.rate
        last = -step
        with open_media(self.path) as container:
            stream = video_stream(container)
            stream.thread_type = "AUTO"
            for picture in decode(container, stream, self.damage, self.path):
                time = last + step if picture.time is None else picture.time - self.zero
                if time <= last or time > last + JUMP:
                    time = last + step
                check_size(picture.width, picture.height, self.path)
                duration = float(picture.duration * picture.time_base) if picture.duration else step
                last = time
                yield Frame(time, min(duration, 10 * max(step, 1.0)), picture)

    def sound(self) -> Iterator[Sound]:
        """See Source."""
        if self.sound_file is not None:
            yield from read_sound(self.sound_file, self.damage)

    def check_end(self, pictures_end: float, sound_end: float) -> None:
        """See Source."""
        end = max(pictures_end, sound_end if self.sound_file is not None and self.sound_file.own else 0.0)
        if self.announced is not None and end < self.announced - max(MISSING_END, 0.01 * self.announced):
            self.damage.note(f"{self.path} is truncated: it ends at {end:.2f} s of {self.announced:.2f} s.")


def open_video(path: Path, *, silent: bool, sound: Path | None) -> VideoFile:
    """Open a video and decode its first picture.

    Args:
        path: of the file.
        silent: continue with silence where there is no sound track.
        sound: another sound instead of the video's own, starting with the first picture.

    Raises:
        DataError: no such file, not a video, no pictures, no sound, or pictures above the limits.
    """
    damage = Damage()
    with open_media(path) as container:
        stream = video_stream(container)
        size = stated_size(stream, path)
        check_size(*size, path)
        first = next(decode(container, stream, damage, path), None)
        if first is None:
            cause = "the file is damaged."
            if 0 in size:
                cause = (
                    "its header states no size, or one far above the limits, which are "
                    f"{MAX_SIDE:,} pixels per side and {MAX_PIXELS:,} together."
                )
            raise DataError(f"{path} has a picture track, and no picture in it can be decoded: {cause}")
        check_size(first.width, first.height, path)
        zero = first.time if first.time is not None else 0.0
        orientation = orientation_of(first)
        width, height = orientation.size(first.width, first.height)
        rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
        start = container.start_time / av.time_base if container.start_time is not None else zero
        total = container.duration / av.time_base - (zero - start) if container.duration else None
        has_length = container.format.name.split(",")[0] in WITH_LENGTH
        own = container.streams.audio[0] if container.streams.audio else None
        if sound is None and own is None and not silent:
            raise DataError(
                f"{path} has no sound track: --silent goes on with silence, --sound FILE with another sound."
            )
        track = None if sound is not None or own is None else SoundFile(path, 0, zero, sound_rate(own, path), own=True)
        length = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else total
    return VideoFile(
        path=path,
        width=width,
        height=height,
        rate=min(max(rate, 0.1), 1000.0),
        duration=length,
        orientation=orientation,
        aspect=float(first_aspect(stream)),
        sound_file=open_sound(sound) if sound is not None else track,
        zero=zero,
        announced=total if has_length else None,
    )


def video_stream(container: Any) -> Any:
    """The first picture track that is not a cover.

    Raises:
        DataError: there is none.
    """
    cover = getattr(av.stream.Disposition, "attached_pic", 0)
    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & cover:
            return stream
    raise DataError(f"{container.name.removeprefix('file:')} has no picture track.")


def stated_size(stream: Any, path: Path) -> tuple[int, int]:
    """Width and height that a header states, pixels; 0 where it states none, or one that FFmpeg takes for a fault.

    FFmpeg drops sizes for which a picture cannot be addressed. Those of a GIF are read from its first ten bytes.
    """
    context = stream.codec_context
    if context.width == 0 and context.name == "gif":
        with path.open("rb") as file:
            start = file.read(10)
        if len(start) == 10 and start.startswith(b"GIF8"):
            width, height = struct.unpack("<HH", start[6:])
            return int(width), int(height)
    return int(context.width), int(context.height)


def orientation_of(picture: Any) -> Orientation:
    """How a picture is stored, from its display matrix (libavutil/display.h); quarter turns and mirrors."""
    data = picture.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Orientation()
    # x' = a x + c y, y' = b x + d y, with x to the right and y downwards
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(data), np.int32)[:5])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(True, c < 0, b < 0)
    return Orientation(False, a < 0, d < 0)


def first_aspect(stream: Any) -> float:
    """Width of a pixel over its height."""
    ratio = stream.codec_context.sample_aspect_ratio
    return float(ratio) if ratio else 1.0
