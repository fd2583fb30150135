"""Tiny videos made with PyAV, and predictors that need no weights."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import numpy.typing as npt
from torch import Tensor

from dataloader.front_ends import AISFX

if TYPE_CHECKING:
    from scripts.prediction import PredictionModel

CLOCK = Fraction(1, 1000)
Picture = Callable[[int], npt.NDArray[np.uint8]]


class Bright:
    """Paints what is bright; keeps what it was given."""

    def __init__(self) -> None:
        self.log_mels: list[Tensor] = []
        self.real: list[int] = []

    def logits(self, batch: Mapping[str, Any], first_clip: int) -> Tensor:
        self.real.append(int(batch["vid_temporal_mask_flag"].sum()))
        self.log_mels.extend(batch["log_mel"][0, : self.real[-1]])
        return (batch["frames"].flatten(0, 1).mean(dim=1, keepdim=True) - 0.5) * 10


def bright_model(size: tuple[int, int] = (32, 32), num_frames: int = 3) -> "PredictionModel":
    from scripts.prediction import PredictionModel  # and with it the model, which makers of videos need not wait for

    return PredictionModel(
        Bright(),
        AISFX,
        size=size,
        num_frames=num_frames,
        classes=["background", "sounding object"],
        description={"checkpoint": "bright"},
    )


def corner(width: int, height: int) -> Picture:
    """A black picture with a white quarter at the top left."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = 255
    return lambda index: picture


def flash(width: int, height: int, at: int) -> Picture:
    """Black pictures, and one white one."""
    return lambda index: np.full((height, width, 3), 255 if index == at else 0, np.uint8)


def make_video(
    path: Path,
    *,
    size: tuple[int, int] = (64, 48),
    times: Sequence[int] = tuple(range(0, 2000, 100)),
    picture: Picture | None = None,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    sound: npt.NDArray[np.float32] | None = None,
    sound_codec: str = "aac",
    layout: str = "mono",
    rate: int = 16_000,
    late: float = 0.0,
    matrix: Sequence[int] | None = None,
    aspect: Fraction = Fraction(1),
    options: dict[str, str] | None = None,
) -> Path:
    """Write a video.

    Args:
        path: its suffix names the container.
        size: (width, height) as stored.
        times: of the pictures, milliseconds.
        picture: number -> (H, W, 3) uint8; a white corner by default.
        codec: of the pictures.
        pixels: their format.
        sound: (n,), the same in all channels; None: no sound track.
        sound_codec: of it.
        layout: of its channels.
        rate: Hz.
        late: time of the first sample, seconds.
        matrix: a, b, c, d of the display matrix, whole numbers; .mp4 and .mov only.
        aspect: width of a pixel over its height.
        options: of the container.
    """
    picture = picture or corner(*size)
    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream(codec, rate=10)
        video.width, video.height, video.pix_fmt = *size, pixels
        video.codec_context.time_base = CLOCK
        video.codec_context.sample_aspect_ratio = aspect
        audio = None
        if sound is not None:
            audio = container.add_stream(sound_codec, rate=rate, layout=layout)
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(index), "rgb24")
            frame.pts, frame.time_base = time, CLOCK
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            assert sound is not None
            channels = audio.codec_context.layout.nb_channels
            resampler = av.AudioResampler(audio.codec_context.format.name, layout, rate)
            for start in range(0, len(sound), 1024):
                part = np.ascontiguousarray(np.repeat(sound[None, start : start + 1024], channels, axis=0))
                piece = av.AudioFrame.from_ndarray(part, "fltp", layout)
                piece.rate, piece.pts, piece.time_base = rate, start + round(late * rate), Fraction(1, rate)
                for converted in resampler.resample(piece):
                    container.mux(audio.encode(converted))
            container.mux(audio.encode(None))
    if matrix is not None:
        turn(path, matrix)
    return path


def turn(path: Path, matrix: Sequence[int]) -> None:
    """Write a, b, c, d into the display matrix of the picture track of an .mp4 or .mov."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # version, flags, times, id, duration, layer, group, volume
    a, b, c, d = matrix
    values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(data)


def impulse(seconds: float, rate: int, at: float) -> npt.NDArray[np.float32]:
    """Silence with a burst of 5 ms."""
    out = np.zeros(round(seconds * rate), np.float32)
    first = round(at * rate)
    out[first : first + rate // 200] = 0.9
    return out


def tone(seconds: float, rate: int) -> npt.NDArray[np.float32]:
    """A rising tone."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 + 300 * time) * time)).astype(np.float32)


def read_video(path: Path) -> tuple[list[float], list[npt.NDArray[np.uint8]]]:
    """Times of the pictures, seconds, and the pictures (H, W, 3)."""
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return [time for time, _ in frames], [picture for _, picture in frames]


def read_audio(path: Path) -> tuple[float, npt.NDArray[np.float32], int]:
    """Time of the first sample, seconds, the samples (n,) of all channels' mean, and the rate."""
    parts, start, rate = [], None, 0
    with av.open(str(path)) as container:
        resampler: Any = None
        for frame in container.decode(audio=0):
            resampler = resampler or av.AudioResampler("fltp", frame.layout.name, frame.rate)
            start, rate = frame.time if start is None else start, frame.rate
            parts += [part.to_ndarray().mean(axis=0) for part in resampler.resample(frame)]
    assert start is not None
    return start, np.concatenate(parts), rate
