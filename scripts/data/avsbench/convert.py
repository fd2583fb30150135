"""From the files of one clip of AVSBench to those that training reads, and the disk space they take."""

import errno
import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from dataloader.audio import (
    LOG_MEL_KEY,
    PATCH_SHAPE,
    check_log_mel,
    clip_log_mel,
    mono,
    read_wave,
)
from dataloader.images import Placement, open_image, read_binary_mask, read_colour_mask
from dataloader.palette import MAX_CLASSES, palette
from dataloader.pickles import read_tensor
from dataloader.preflight import Fault
from dataloader.video import read_video_frames, read_video_sound
from scripts.data.avsbench.release import NUM_CLASSES, SourceClip
from utils.errors import DataError, UserError
from utils.files import atomic_path

STRETCH, SHORTER = "stretch", "shorter"
ASPECT_TOLERANCE = 0.03
_JPEG = {"quality": 95, "subsampling": 0}
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# Bytes per pixel of photographs at 224 pixels, upper estimates; bytes of a file's last, half-filled block.
_PNG_PIXEL, _JPEG_PIXEL, _MASK_PIXEL, _BLOCK = 2.4, 0.8, 0.06, 4096
_VIDEO_RATE = 48_000  # Hz, of the sounds of videos, for the estimate


class CannotWriteError(UserError):
    """The folder of prepared data is full, read-only or failing."""


@dataclass(frozen=True)
class Settings:
    """What determines the prepared files.

    Attributes:
        size: of the frames and masks, pixels; None = as they are.
        fit: 'stretch' to size x size, or 'shorter': the shorter side is `size`, and the aspect stays.
        sample_rate: of the waves, Hz; None = wave files are copied as they are, and sounds of videos keep their rate.
        pkl: also write log-mels as AVSBench's `.pkl`.
    """

    size: int | None = 224
    fit: str = STRETCH
    sample_rate: int | None = None
    pkl: bool = False

    def placement(self, width: int, height: int) -> Placement:
        """The size of a frame of width x height, pixels."""
        if self.size is None:
            return Placement(height, width)
        if self.fit == STRETCH:
            return Placement(self.size, self.size)
        scale = self.size / min(width, height)
        return Placement(max(self.size, round(height * scale)), max(self.size, round(width * scale)))


def is_made(clip: SourceClip, settings: Settings) -> bool:
    """Whether a clip is finished: its log-mel is written last."""
    return clip.made.log_mel.is_file() and (not settings.pkl or _pkl(clip).is_file())


def bytes_needed(clip: SourceClip, settings: Settings) -> int:
    """Estimate of the space that a clip will take on disk, bytes; for photographs it is rather too high."""
    frames, masks = len(clip.made.frames), len(clip.made.masks)
    if settings.size is None:
        pixels = 1280 * 720
        for path in clip.frames[:1]:
            try:
                with Image.open(path) as image:
                    pixels = image.width * image.height
            except OSError:
                break
    else:
        pixels = round(settings.size**2 * (1 if settings.fit == STRETCH else 16 / 9))
    per_frame = _JPEG_PIXEL if clip.task == "avss" else _PNG_PIXEL
    log_mel = frames * 4 * int(np.prod(PATCH_SHAPE))
    sizes = [per_frame * pixels] * frames + [_MASK_PIXEL * pixels + 900] * masks
    sizes += [_wave_bytes(clip, settings.sample_rate), *([log_mel] * (2 if settings.pkl else 1))]
    return sum(int(-(-size // _BLOCK) + 1) * _BLOCK for size in sizes)


def _wave_bytes(clip: SourceClip, rate: int | None) -> float:
    if rate is None:
        try:
            return clip.wav.stat().st_size
        except OSError:
            rate = _VIDEO_RATE
    return len(clip.made.frames) * rate * 2.0


def convert(clip: SourceClip, settings: Settings) -> list[Fault]:
    """Make the files of a clip, the log-mel last, or none of them where anything is wrong.

    Returns:
        All faults of the clip's files.

    Raises:
        CannotWriteError: a file cannot be written.
    """
    faults = _Faults(clip)
    frames = _frames(clip, faults)
    with faults.collect("frames"):
        _check_sizes(clip, [image.size for image, _ in frames])
    placement = settings.placement(*frames[0][0].size) if frames else Placement(1, 1)
    masks: list[bytes] = []
    folder = clip.masks[0].parent
    if not folder.is_dir():
        with faults.collect("masks"):
            raise DataError(f"the folder {folder} is missing: unpack the masks, or remove the line.")
    for path in clip.masks if folder.is_dir() else ():
        with faults.collect("masks"):
            masks.append(_mask(clip, path, frames[0][0].size if frames else None, placement))
    wave: bytes | None = None
    log_mel: Tensor | None = None
    with faults.collect("sound"):
        wave, log_mel = _sound(clip, settings)
    if faults.found or log_mel is None:
        return faults.found
    with _explained(clip):
        for (image, origin), target in zip(frames, clip.made.frames, strict=True):
            _write(target, _frame(image, origin, target, placement))
        for data, target in zip(masks, clip.made.masks, strict=True):
            _write(target, data)
        if wave is not None:
            _write(clip.made.wav, wave)
        if settings.pkl:
            _write(_pkl(clip), pickle.dumps(log_mel))
        _write(clip.made.log_mel, save({LOG_MEL_KEY: log_mel}))
    return []


class _Faults:
    """Faults of a clip; `collect` notes one and goes on."""

    def __init__(self, clip: SourceClip) -> None:
        self.clip = clip
        self.found: list[Fault] = []

    @contextmanager
    def collect(self, kind: str) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            self.found.append(Fault(self.clip.split, self.clip.name, kind, str(error), self.clip.row))


def _frames(clip: SourceClip, faults: _Faults) -> list[tuple[Image.Image, Path | None]]:
    """The frames, and the files they are in; those of a video are in none."""
    found: list[tuple[Image.Image, Path | None]] = []
    folder = clip.frames[0].parent
    if clip.video is not None and not folder.is_dir():
        with faults.collect("frames"):
            found += [(image, None) for image in read_video_frames(clip.video, len(clip.frames))]
        return found
    if not folder.is_dir():
        with faults.collect("frames"):
            raise DataError(f"the folder {folder} is missing, and so is a video: unpack it, or remove the line.")
        return found
    for path in clip.frames:
        with faults.collect("frames"):
            found.append((open_image(path, "frame"), path))
    return found


def _check_sizes(clip: SourceClip, sizes: Sequence[tuple[int, int]]) -> None:
    if len(set(sizes)) > 1:
        seen = ", ".join(sorted({f"{width} x {height}" for width, height in sizes}))
        raise DataError(f"the frames in {clip.frames[0].parent} have different sizes: {seen}.")


def _frame(image: Image.Image, path: Path | None, target: Path, placement: Placement) -> bytes:
    """A frame's file; the source's own bytes where format and size are those that are wanted."""
    kind = "JPEG" if target.suffix == ".jpg" else "PNG"
    if path is not None and image.format == kind and image.size == (placement.width, placement.height):
        return path.read_bytes()
    image = placement.apply(image if image.mode == "RGB" else image.convert("RGB"), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, kind, **(_JPEG if kind == "JPEG" else {}))
    return buffer.getvalue()


def _mask(clip: SourceClip, path: Path, frame: tuple[int, int] | None, placement: Placement) -> bytes:
    """A mask's file: black and white for s4 and ms3, class indices with AVSS's palette for avss."""
    image = open_image(path, "mask")
    if frame is not None and abs(frame[0] * image.height / (frame[1] * image.width) - 1) > ASPECT_TOLERANCE:
        raise DataError(
            f"the mask {path} has {image.width} x {image.height} pixels and its frame {frame[0]} x {frame[1]}, which "
            "is another aspect ratio."
        )
    if clip.task != "avss":
        return _png(Image.fromarray(read_binary_mask(path, placement) * np.uint8(255)))
    if path.parent.name == "labels_semantic":
        classes = _indices(image, path, placement)
    else:
        classes = read_colour_mask(path, placement, NUM_CLASSES)
    indexed = Image.fromarray(classes).convert("P")
    indexed.putpalette(palette(MAX_CLASSES).tobytes())
    return _png(indexed)


def _indices(image: Image.Image, path: Path, placement: Placement) -> npt.NDArray[np.uint8]:
    """Class indices of a file of labels_semantic, whatever its palette."""
    if image.mode not in ("L", "P"):
        raise DataError(f"the mask {path} has the mode {image.mode}, and labels_semantic holds class indices (L or P).")
    classes = np.array(placement.apply(image, Image.Resampling.NEAREST))
    if classes.max(initial=0) >= NUM_CLASSES:
        raise DataError(f"the mask {path} has the class {classes.max()}; AVSS has {NUM_CLASSES} classes.")
    return classes


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _sound(clip: SourceClip, settings: Settings) -> tuple[bytes | None, Tensor]:
    """The wave's file, None where only a log-mel is handed out, and the log-mel, of the wave as it was."""
    count = len(clip.frames)
    wave: bytes | None = None
    computed: Callable[[], Tensor] | None = None
    if clip.wav.is_file():
        samples, rate = read_wave(clip.wav)
        fits = settings.sample_rate is None or _is_mono_pcm16(clip.wav, settings.sample_rate)
        wave = clip.wav.read_bytes() if fits else _wave(samples, rate, settings.sample_rate)
        computed = partial(clip_log_mel, samples, rate, clip.wav, patches=count)
    elif clip.video is not None:
        sound, rate = read_video_sound(clip.video, count)
        wave = _wave(sound, rate, settings.sample_rate)
        computed = partial(clip_log_mel, sound[:, None], rate, clip.video, patches=count)
    if clip.log_mel.is_file():
        return wave, check_log_mel(read_tensor(clip.log_mel), clip.log_mel, patches=count)
    if computed is None:
        raise DataError(f"the sound is missing, both {clip.wav} and {clip.log_mel}, and so is a video.")
    return wave, computed()


def _is_mono_pcm16(path: Path, rate: int) -> bool:
    info = soundfile.info(path)
    return (info.format, info.subtype, info.channels, info.samplerate) == ("WAV", "PCM_16", 1, rate)


def _wave(samples: npt.NDArray[np.int16], rate: int, wanted: int | None) -> bytes:
    """A mono PCM16 file of samples (n,) or (n, channels), resampled to the wanted rate, Hz."""
    signal = mono(samples)
    if wanted is not None and rate != wanted:
        import resampy  # imports numba, not needed at the wanted rate

        signal = resampy.resample(signal, rate, wanted, filter="kaiser_best")
    whole = np.clip(np.rint(signal * 32768.0), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, whole, wanted or rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def _pkl(clip: SourceClip) -> Path:
    return clip.made.log_mel.with_suffix(".pkl")


def _write(path: Path, data: bytes) -> None:
    with atomic_path(path, durable=False) as part:
        part.write_bytes(data)


@contextmanager
def _explained(clip: SourceClip) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        folder = clip.made.wav.parent
        raise CannotWriteError(
            f"{folder} cannot be written ({os.strerror(error.errno)}); the finished clips are kept: make room, and run "
            "the same command again."
        ) from error


def free_bytes(folder: Path) -> int:
    """Free space of the disk that a folder, which need not exist, is on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def limit_threads() -> None:
    """One thread per process, since each core has a process."""
    torch.set_num_threads(1)
