"""An uploaded video or sound: checked, and brought to the form that the page works on.

A clip is a small upright video without sound, and its sound as a wave file; the upload itself is not needed any more.
"""

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import soundfile

from scripts.prediction.media import open_media, open_sound, read_channels
from scripts.prediction.overlay import Track, even, split
from scripts.prediction.source import Damage, SoundFile
from scripts.prediction.video import VideoFile, open_video, stated_size, video_stream
from utils.errors import DataError

PREVIEW_SIDE = 640  # pixels
PREVIEW_RATE = 30.0  # pictures per second
MAX_WAVE_CHANNELS = 8


@dataclass(frozen=True)
class Limits:
    """Of an upload.

    Attributes:
        megabytes: of the file, 2^20 bytes, as Gradio counts.
        seconds: of a video; longer sounds are cut.
        side: pixels, width and height.
        pixels: per picture.
    """

    megabytes: float = 100.0
    seconds: float = 60.0
    side: int = 4096
    pixels: int = 4096 * 2304


@dataclass(frozen=True)
class Clip:
    """A video as the page works on it.

    Attributes:
        name: of the upload.
        pictures: an .mp4 without sound, upright, square pixels, at most PREVIEW_SIDE wide and high.
        sound: a .wav; None: the video has none.
        seconds: length of the pictures.
        width, height: of the pictures, even, pixels.
        damage: what was wrong with the upload; empty for a whole one.
    """

    name: str
    pictures: Path
    sound: Path | None
    seconds: float
    width: int
    height: int
    damage: str

    def remove(self) -> None:
        """Remove its files."""
        self.pictures.unlink(missing_ok=True)
        if self.sound is not None:
            self.sound.unlink(missing_ok=True)


def read_clip(upload: Path, folder: Path, limits: Limits) -> Clip:
    """Check a video and write `folder`/clip.mp4 and clip.wav.

    Raises:
        DataError: it is not a video, damaged from its start on, or above a limit. The message may hold `upload`'s path:
            see `sentences.public`.
    """
    _check_bytes(upload, limits)
    with open_media(upload) as container:
        _check_pixels(*stated_size(video_stream(container), upload), upload, limits)
    video = open_video(upload, silent=True, sound=None)
    _check_pixels(video.width, video.height, upload, limits)
    if video.duration is not None:
        _check_seconds(video.duration, upload, limits)
    pictures, sound = folder / "clip.mp4", folder / "clip.wav"
    try:
        width, height, seconds = _write_pictures(video, pictures, limits)
        heard = video.sound_file is not None and _write_sound(video.sound_file, sound, seconds, video.damage)
    except BaseException:
        pictures.unlink(missing_ok=True)
        sound.unlink(missing_ok=True)
        raise
    return Clip(upload.name, pictures, sound if heard else None, seconds, width, height, video.damage.message)


def read_other_sound(upload: Path, target: Path, seconds: float, limits: Limits) -> None:
    """Check a sound, or the sound of a video, and write its first `seconds` as a .wav.

    Raises:
        DataError: it has no sound, or is above the limit of size.
    """
    _check_bytes(upload, limits)
    if not _write_sound(open_sound(upload), target, seconds, Damage()):
        raise DataError(f"{upload} has a sound track, and nothing in it can be decoded.")


def _check_bytes(path: Path, limits: Limits) -> None:
    size = path.stat().st_size / 2**20
    if size > limits.megabytes:
        raise DataError(f"{path} has {size:,.0f} MB; this page takes up to {limits.megabytes:,.0f} MB.")


def _check_pixels(width: int, height: int, path: Path, limits: Limits) -> None:
    if max(width, height) > limits.side or width * height > limits.pixels:
        raise DataError(
            f"{path} has pictures of {width:,} x {height:,} pixels; this page takes up to {limits.side:,} per side and "
            f"{limits.pixels / 1e6:.1f} million together."
        )


def _check_seconds(seconds: float, path: Path, limits: Limits) -> None:
    if seconds > limits.seconds + 0.5:  # a camera stops a little late
        raise DataError(
            f"{path} is longer than {limits.seconds:.0f} seconds, the limit of this page: cut it, or use "
            "scripts/predict.sh, which takes any length."
        )


def _write_pictures(video: VideoFile, target: Path, limits: Limits) -> tuple[int, int, float]:
    """Write the small video; its width, height and length in seconds."""
    width, height = _preview_size(video)
    stored = video.orientation.size(width, height)
    end, due = 0.0, 0.0
    with av.open(str(target), "w", format="mp4", options={"movflags": "faststart"}) as container:
        codec, options = "libx264", {"preset": "veryfast", "crf": "16", "bf": "0"}
        if codec not in av.codecs_available:
            codec, options = "mpeg4", {"qscale": "2", "flags": "+qscale", "global_quality": str(2 * 118)}
        track = Track(container, codec, width, height, min(video.rate, PREVIEW_RATE), "yuv420p", options)
        for frame in video.frames():
            _check_seconds(frame.time, video.path, limits)
            _check_pixels(frame.picture.width, frame.picture.height, video.path, limits)
            end = frame.time + frame.duration
            if frame.time < due:
                continue
            due = max(due + 1 / PREVIEW_RATE, frame.time + 0.5 / PREVIEW_RATE)
            small = frame.picture.reformat(width=stored[0], height=stored[1], format="yuv420p")
            planes = split(np.asarray(small.to_ndarray(), np.uint8), stored[1])
            upright = [video.orientation.apply(plane) for plane in planes]
            out = np.concatenate([plane.reshape(-1) for plane in upright]).reshape(height * 3 // 2, width)
            track.write(av.VideoFrame.from_ndarray(out, "yuv420p"), frame.time, frame.duration)
        if end == 0:
            raise DataError(video.damage.message or f"{video.path}: no picture can be decoded.")
        track.close()
    return width, height, min(end, limits.seconds + 0.5)


def _preview_size(video: VideoFile) -> tuple[int, int]:
    aspect = 1 / video.aspect if video.orientation.swap else video.aspect
    width, height = video.width * min(max(aspect, 0.1), 10.0), float(video.height)
    scale = min(1.0, PREVIEW_SIDE / max(width, height))
    return even(max(16, round(width * scale))), even(max(16, round(height * scale)))


def _write_sound(track: SoundFile, target: Path, seconds: float, damage: Damage) -> bool:
    """Write the first `seconds` of a sound; False where nothing can be decoded."""
    left = max(1, round(seconds * track.rate))
    file: soundfile.SoundFile | None = None
    try:
        for piece in read_channels(track, damage):
            part = piece[:MAX_WAVE_CHANNELS, :left]
            if file is None:
                file = soundfile.SoundFile(target, "w", track.rate, len(part), "PCM_16")
            file.write(np.clip(part.T, -1, 1))
            left -= part.shape[1]
            if left <= 0:
                break
    finally:
        if file is not None:
            file.close()
    return file is not None
