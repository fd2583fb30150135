"""Opening of videos and sounds with PyAV, whose wheels carry FFmpeg; the frames and the sound of a clip of a video."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dataloader.audio import MAX_SECONDS
from dataloader.images import MAX_PIXELS
from utils.errors import DataError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv")
SAMPLES_PER_SECOND = 16
"""AVSBench's preprocess scripts cut each second into 16 samples, and keep the last."""
_POSITION = Fraction(SAMPLES_PER_SECOND - 1, SAMPLES_PER_SECOND)
FORMATS = (
    "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,ogg,asf,asf_o,rm,mxf,gxf,nut,dv,ivf,gif,apng,y4m,"
    "yuv4mpegpipe,h264,hevc,m4v,wav,w64,flac,mp3,aac,ac3,eac3,aiff,au,caf,amr,opus,wv,tta,ape,mpc,mpc8,dts,truehd,wtv"
)
"""Containers that are opened. Playlists (HLS, DASH, concat, SDP), which name other files and addresses, are not."""
MAX_SOUND_RATE = 384_000  # Hz
_MISSING_END = 1.0  # seconds


def open_media(path: str | Path) -> Any:
    """Open a container for reading; a context manager.

    Raises:
        DataError: no such file, empty, or not a container that is read.
    """
    import av  # FFmpeg's libraries, which only videos need

    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")
    try:
        # `file:`: a colon in the name would be read as a protocol.
        return av.open(f"file:{path}", options={"format_whitelist": FORMATS, "protocol_whitelist": "file"})
    except (av.FFmpegError, UnicodeError, ValueError) as error:
        raise DataError(
            f"{path} is not a video or sound that FFmpeg reads, or its header is cut off ({reason(error)})."
        ) from error


def sound_rate(stream: Any, path: str | Path) -> int:
    """Sample rate of a sound track, Hz.

    Raises:
        DataError: it is outside 1,000 to `MAX_SOUND_RATE`.
    """
    rate = int(stream.codec_context.sample_rate or 0)
    if not 1000 <= rate <= MAX_SOUND_RATE:
        raise DataError(f"{path} has a sound of {rate} Hz; 1,000 to {MAX_SOUND_RATE:,} Hz are read.")
    return rate


def reason(error: BaseException) -> str:
    """What FFmpeg says, without its number and the file's name."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


def frame_times(rate: Fraction | float, count: int) -> list[float]:
    """When the frames of a clip are shown, one per second, as AVSBench's preprocess scripts choose them.

    With the rate rounded to R pictures per second, second t has the picture of number floor((t + 15/16) R).

    Args:
        rate: of the video, pictures per second.
        count: of the frames, T.

    Returns:
        The middle of each picture's display, seconds from the first picture.
    """
    rounded = max(round(rate), 1)
    return [float((int((second + _POSITION) * rounded) + Fraction(1, 2)) / Fraction(rate)) for second in range(count)]


def read_video_frames(path: str | Path, count: int, *, start: float = 0.0) -> list[Image.Image]:
    """The frames of a clip, one per second; the video is decoded from its beginning.

    Args:
        path: of the video.
        count: of the frames, T. A video that ends up to one second early repeats its last picture, as in AVSBench.
        start: of the clip, seconds from the first picture.

    Returns:
        `count` RGB images, upright, at the size that is stored.

    Raises:
        DataError: the file is missing, not a video, damaged, or more than a second too short.
    """
    found: list[Image.Image] = []
    end = 0.0
    with open_media(path) as container:
        stream = _picture_track(container, path)
        stream.thread_type = "AUTO"
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        wanted = [start + time for time in frame_times(rate, count)]
        zero: float | None = None
        shown: Any = None
        for picture in _decode(container, stream, path):
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(f"the video {path} has more than {MAX_PIXELS:,} pixels, the limit.")
            time = picture.time if picture.time is not None else end + float(1 / rate)
            zero = time if zero is None else zero
            end = time - zero
            while len(found) < count and shown is not None and end > wanted[len(found)]:
                found.append(_upright(shown))
            shown = picture
            if len(found) == count:
                return found
        if shown is None:
            raise DataError(f"the video {path} has no picture that can be decoded: it is damaged.")
        end += float(1 / rate)
        if end < start + count - _MISSING_END:
            raise DataError(f"the video {path} lasts {end:.2f} s, but {count} frames need {start + count:g} s.")
        return found + [_upright(shown)] * (count - len(found))


def read_video_sound(path: str | Path, count: int, *, start: float = 0.0) -> tuple[npt.NDArray[np.int16], int]:
    """The sound of a clip, on the clock of its pictures.

    Args:
        path: of the video.
        count: seconds that are read.
        start: of the clip, seconds from the first picture.

    Returns:
        (samples,) int16, channels mixed down, of at most `count` seconds, and the rate in Hz. Silence fills what lies
        before the first sample.

    Raises:
        DataError: the file is missing, damaged, or has no sound; the clip begins after its end.
    """
    if not 0 < count <= MAX_SECONDS:
        raise DataError(f"{count} seconds of {path} are wanted; 1 to {MAX_SECONDS:g} are read.")
    with open_media(path) as container:
        stream = _picture_track(container, path)
        first = next(iter(_decode(container, stream, path)), None)
        zero = first.time if first is not None and first.time is not None else 0.0
    import av

    with open_media(path) as container:
        if not container.streams.audio:
            raise DataError(f"the video {path} has no sound track: give its sound as a wave file.")
        track = container.streams.audio[0]
        rate = sound_rate(track, path)
        samples = np.zeros(round(count * rate), np.int16)
        resampler = av.AudioResampler(format="s16", layout="mono", rate=rate)
        filled = 0
        for frame in _decode(container, track, path):
            at = round(((frame.time or 0.0) - zero - start) * rate)
            for part in resampler.resample(frame):
                piece = part.to_ndarray()[0]
                low, high = max(at, 0), min(at + len(piece), len(samples))
                if low < high:
                    samples[low:high] = piece[low - at : high - at]
                    filled = max(filled, high)
                at += len(piece)
            if at >= len(samples):
                break
    if filled == 0:
        raise DataError(f"the sound of {path} ends before {start:g} s, where the clip begins.")
    return samples[:filled], rate


def _picture_track(container: Any, path: str | Path) -> Any:
    import av

    cover = getattr(av.stream.Disposition, "attached_pic", 0)
    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & cover:
            return stream
    raise DataError(f"the video {path} has no picture track.")


def _decode(container: Any, stream: Any, path: str | Path) -> Iterator[Any]:
    import av

    try:
        yield from container.decode(stream)
    except av.FFmpegError as error:
        raise DataError(f"the video {path} is damaged ({reason(error)}): replace it.") from error


def _upright(picture: Any) -> Image.Image:
    """The picture turned and mirrored by its display matrix (libavutil/display.h)."""
    pixels = picture.to_ndarray(format="rgb24")
    data = picture.side_data.get("DISPLAYMATRIX")
    if data is not None:
        # x' = a x + c y, y' = b x + d y, with x to the right and y downwards
        a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(data), np.int32)[:5])
        turned = abs(b) + abs(c) > abs(a) + abs(d)
        pixels = pixels.swapaxes(0, 1) if turned else pixels
        flip_x, flip_y = (c < 0, b < 0) if turned else (a < 0, d < 0)
        pixels = pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
    return Image.fromarray(np.ascontiguousarray(pixels))


def find_video(folder: Path, stem: str) -> Path | None:
    """The video file `stem` with one of the known suffixes in a folder; None where there is none."""
    candidates: Sequence[Path] = [folder / f"{stem}{suffix}" for suffix in VIDEO_SUFFIXES]
    return next((path for path in candidates if path.is_file()), None)
