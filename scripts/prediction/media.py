"""Reading of videos and sounds with PyAV, whose wheels carry FFmpeg: upright pictures and mono sound on one clock.

Time 0 is the first picture. Pictures and sound are decoded separately, each as a generator, so that memory does not
grow with the length of a file. Sound before time 0 is left out; gaps in it are silence.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import av
import numpy as np
import numpy.typing as npt

from utils.errors import DataError

MAX_SIDE = 16_384  # pixels, the limit of H.264
MAX_PIXELS = 36_000_000  # 8K has 33,177,600
MAX_SOUND_RATE = 384_000  # Hz
MAX_DAMAGED_PACKETS = 200
GAP = 0.02  # seconds; smaller differences between sound and its time stamps are rounding
JUMP = 600.0  # seconds; larger jumps are faults of the time stamps
RESET = 1.0  # seconds; sounds that lie this much before what was read begin anew
MISSING_END = 0.5  # seconds; a file that ends this much before its header says is truncated
PIECE = 1.0  # seconds of silence at a time

FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,ogg,asf,asf_o,rm,mxf,gxf,nut,dv,ivf,gif,apng,y4m,"
    "yuv4mpegpipe,h264,hevc,m4v,wav,w64,flac,mp3,aac,ac3,eac3,aiff,au,caf,amr,opus,wv,tta,ape,mpc,mpc8,dts,truehd,wtv"
)
"""Containers that are opened. Playlists (HLS, DASH, concat, SDP), which name other files and addresses, are not."""
WITH_LENGTH = ("mov", "matroska", "avi", "asf", "flv")
"""Containers whose header states the length."""

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
        context = stream.codec_context
        check_size(context.width, context.height, path)
        first = next(decode(container, stream, damage, path), None)
        if first is None:
            raise DataError(f"{path} has a picture track, and no picture in it can be decoded: the file is damaged.")
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


def open_sound(path: Path) -> SoundFile:
    """A sound file, or the sound of a video, to go with pictures from its start on.

    Raises:
        DataError: no such file, or no sound in it.
    """
    with open_media(path) as container:
        if not container.streams.audio:
            raise DataError(f"{path} has no sound track.")
        stream = container.streams.audio[0]
        start = float(stream.start_time * stream.time_base) if stream.start_time and stream.time_base else 0.0
        return SoundFile(path, 0, start, sound_rate(stream, path), own=False)


def sound_length(path: Path) -> float:
    """Length of a sound, seconds; decoded where the header does not state it."""
    with open_media(path) as container:
        stream = container.streams.audio[0]
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
    track = open_sound(path)
    return sum(len(piece) for piece in read_sound(track, Damage())) / track.rate


def open_media(path: Path) -> Any:
    """Open a container for reading; a context manager.

    Raises:
        DataError: no such file, empty, or not a container that is read.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")
    try:
        # `file:`: a colon in the name would be read as a protocol.
        return av.open(f"file:{path}", options={"format_whitelist": FORMATS, "protocol_whitelist": "file"})
    except (av.FFmpegError, UnicodeError) as error:
        raise DataError(
            f"{path} is not a video or sound that FFmpeg reads, or its header is cut off ({reason(error)})."
        ) from error


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


def decode(container: Any, stream: Any, damage: Damage, path: Path) -> Iterator[Any]:
    """Decoded frames of one stream. Damaged packets are left out and noted; after many, or a break, it ends."""
    faults, position = 0, 0.0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:
            damage.note(f"{path} breaks off at {position:.2f} s ({reason(error)}).")
            with contextlib.suppress(av.FFmpegError):
                yield from stream.decode(None)  # what the decoder still holds
            return
        if packet is None:
            return
        if packet.pts is not None and packet.time_base:
            position = float(packet.pts * packet.time_base)
        try:
            yield from packet.decode()
        except av.EOFError:
            return
        except av.FFmpegError as error:
            damage.note(f"{path} is damaged at {position:.2f} s ({reason(error)}).")
            faults += 1
            if faults >= MAX_DAMAGED_PACKETS:
                return


def read_sound(track: SoundFile, damage: Damage) -> Iterator[Sound]:
    """The sound from `track.zero` on, in pieces (n,) float32, channels averaged; see `read_channels`."""
    for piece in read_channels(track, damage):
        yield piece.mean(axis=0, dtype=np.float32)


def read_channels(track: SoundFile, damage: Damage, layout: str | None = None) -> Iterator[Sound]:
    """The sound from `track.zero` on, in pieces (channels, n) float32 of the rate `track.rate`.

    Gaps of the time stamps are filled with silence; numbers that are not finite become 0.

    Args:
        track: what is read.
        damage: notes the first fault.
        layout: 'mono', 'stereo', '5.1' ...; None keeps the first frame's.
    """
    with open_media(track.path) as container:
        stream = container.streams.audio[track.index]
        stream.thread_type = "AUTO"
        resampler: Any = None
        done = 0  # samples since zero; negative: still before it
        shift = 0  # samples by which the time stamps jumped back
        started = False
        for frame in decode(container, stream, damage, track.path):
            if resampler is None:
                resampler = av.AudioResampler(format="fltp", layout=layout or frame.layout.name, rate=track.rate)
            for part in resampler.resample(frame):
                samples = part.to_ndarray()  # (channels, n)
                at = done if part.time is None else round((part.time - track.zero) * track.rate) + shift
                if not started:
                    done, started = min(at, 0), True
                gap = at - done
                if gap < -RESET * track.rate:  # two recordings in one file: the second follows the first
                    shift, gap = shift - gap, 0
                if GAP * track.rate < gap < JUMP * track.rate:
                    for piece in silence(gap, track.rate):
                        yield np.repeat(piece[None], len(samples), axis=0)
                    done += gap
                elif gap < -GAP * track.rate:
                    samples = samples[:, -gap:]
                if done < 0:
                    skipped = min(-done, samples.shape[1])
                    samples, done = samples[:, skipped:], done + skipped
                done += samples.shape[1]
                if samples.shape[1]:
                    yield np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0)


def silence(samples: int, rate: int) -> Iterator[Sound]:
    """Zeros, in pieces of at most a second."""
    piece = max(1, round(PIECE * rate))
    while samples > 0:
        yield np.zeros(min(samples, piece), np.float32)
        samples -= piece


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


def check_size(width: int, height: int, path: Path) -> None:
    """Raise DataError for pictures above the limits."""
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise DataError(
            f"{path} has pictures of {width} x {height} pixels; the limits are {MAX_SIDE:,} per side and "
            f"{MAX_PIXELS:,} together."
        )


def sound_rate(stream: Any, path: Path) -> int:
    """Sample rate of a sound track, Hz."""
    rate = int(stream.codec_context.sample_rate or 0)
    if not 1000 <= rate <= MAX_SOUND_RATE:
        raise DataError(f"{path} has a sound of {rate} Hz; 1,000 to {MAX_SOUND_RATE:,} Hz are read.")
    return rate


def first_aspect(stream: Any) -> float:
    """Width of a pixel over its height."""
    ratio = stream.codec_context.sample_aspect_ratio
    return float(ratio) if ratio else 1.0


def reason(error: BaseException) -> str:
    """What FFmpeg says, without its number and the file's name."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()).rstrip(".")
