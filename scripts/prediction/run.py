"""`predict`: from a video with sound to masks, an overlay and a report.

Two passes over the video keep memory flat. The first reads pictures and sound, predicts masks and stores them
(`store.py`); the second reads the pictures again and paints them, with a strip whose time axis is then known.

Mask k of F masks per second stands for the pictures from k / F to (k + 1) / F seconds. The model sees the picture shown
at t = (k + 0.48) / F and the sound from t - 0.48 seconds on. At F = 1 that is the alignment of training: the sound of
second k starts at k seconds (dataloader/front_ends.py) and lasts 0.96 s (VGGish: 0.975 s), and the picture is taken in
its middle. AVSBench has one picture per second, without a note from which moment of it.
"""

import contextlib
import json
import math
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console

from scripts.prediction.masks import Tint, areas, blended, save_mask
from scripts.prediction.media import Frame, Source, open_video, reason
from scripts.prediction.meter import Meter, Report
from scripts.prediction.model import Planes, PredictionModel
from scripts.prediction.overlay import (
    OverlayWriter,
    draw_strip,
    even,
    mask_picture,
    open_masks_video,
    strip_height,
)
from scripts.prediction.pictures import PICTURES, open_pictures
from scripts.prediction.sound import Envelope, SoundWindows
from scripts.prediction.store import MaskStore, refuse_other_options
from utils.errors import ConfigError, DataError
from utils.files import atomic_path

MIDDLE = 0.48  # seconds from the start of a window of sound to its picture
RESULT, OVERLAY, MASKS, MASKS_VIDEO = "result.json", "overlay.mp4", "masks", "masks.mov"
SPARE_BYTES = 64 * 2**20
BETWEEN, MASK_FORMS = ("hold", "blend"), ("png", "video", "none")
EPSILON = 1e-6


@dataclass(frozen=True)
class Options:
    """What is predicted and written.

    Attributes:
        fps: masks per second, at most one per picture.
        between: 'hold' or 'blend' (linearly): masks of the pictures between two predictions.
        masks: 'png' (a PNG per prediction), 'video' (a .mov with alpha) or 'none'.
        threshold: of the probability, for painted shares and the overlay.
        silent: continue with silence where there is no sound.
        sound: a file whose sound replaces the video's.
        fps_in: pictures per second of a folder.

    Raises:
        ConfigError: a value out of range.
    """

    fps: float = 1.0
    between: str = "hold"
    masks: str = "png"
    threshold: float = 0.5
    silent: bool = False
    sound: Path | None = None
    fps_in: float = 1.0

    def __post_init__(self) -> None:
        for key, value, high in (("fps", self.fps, 1000.0), ("fps-in", self.fps_in, 1000.0)):
            if not (math.isfinite(value) and 0.001 <= value <= high):
                raise ConfigError(f"--{key} {value:g} is not between 0.001 and {high:g} per second.")
        if not 0 < self.threshold < 1:
            raise ConfigError(f"--threshold {self.threshold:g} is not between 0 and 1.")
        for name, choice, known in (("between", self.between, BETWEEN), ("masks", self.masks, MASK_FORMS)):
            if choice not in known:
                raise ConfigError(f"--{name} {choice} is not one of {', '.join(known)}.")


@dataclass(frozen=True)
class Prediction:
    """What was written for one video.

    Attributes:
        folder: of the results.
        overlay: the video, with masks and sound.
        result: the report, JSON.
        masks: the folder of PNGs, the video of masks, or None.
        count: predicted masks.
        seconds: length of the pictures.
        damage: what was wrong with the file; empty for a whole one. The results then end at the break.
    """

    folder: Path
    overlay: Path
    result: Path
    masks: Path | None
    count: int
    seconds: float
    damage: str


def predict(
    model: PredictionModel,
    video: str | Path,
    out: str | Path = "predictions",
    *,
    options: Options | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    **changes: Any,
) -> Prediction:
    """Segment the sounding objects of a video, a folder of pictures with a sound, or a picture with a sound.

    Results go to `out/<name of the video>/`. An interrupted call goes on where it was; a finished one is not repeated.

    Args:
        model: from `load_for_prediction`.
        video: a file that FFmpeg reads, a folder or a picture (PNG, JPEG).
        out: folder of the results of all videos.
        options: see Options.
        overwrite: remove the results of other options instead of refusing.
        console: for the progress.
        **changes: options by name, `fps=5` for example.

    Raises:
        ConfigError: an option out of range, or the folder holds results of other options.
        DataError: the video has no pictures or no sound, is not one, or is above the limits; too little disk.
    """
    options = Options(**{**(asdict(options) if options is not None else {}), **changes})
    options = Options(**{**asdict(options), "sound": Path(options.sound) if options.sound is not None else None})
    video = Path(video)
    folder = Path(out) / result_name(video)
    if not video.exists():
        raise DataError(f"{video} does not exist.")
    wanted = _wanted(model, video, options)
    if overwrite:
        _clear(folder)
    finished = _finished(folder, wanted, options)
    if finished is not None:
        return finished
    source = open_source(video, options)
    fps = min(options.fps, source.rate)
    check_disk(folder, source, options, fps, model.size)
    store = MaskStore(folder, wanted, (2 if model.semantic else 1, *model.size))
    try:
        with Meter(result_name(video), console) as meter:
            envelope, seconds = predict_masks(model, source, store, folder, options, fps, meter)
            paint(source, store, folder, options, fps, envelope, seconds, meter)
        header = {
            "seconds": round(seconds, 3),
            "width": source.width,
            "height": source.height,
            "masks_per_second": fps,
            "damage": source.damage.message,
            "options": wanted,
            "versions": versions(),
        }
        write_result(folder / RESULT, header, store)
        done = _prediction(folder, options, store.count, seconds, source.damage.message)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({error.strerror or error}); make room and run the same command, which goes "
            f"on after {store.count} masks."
        ) from error
    except av.FFmpegError as error:
        raise DataError(f"{folder / OVERLAY} cannot be written ({reason(error)}).") from error
    finally:
        store.close()
    store.remove()
    return done


def open_source(video: Path, options: Options) -> Source:
    """A video, a folder of pictures or a picture, as its path says."""
    if video.is_dir() or video.suffix.lower() in PICTURES:
        return open_pictures(video, silent=options.silent, sound=options.sound, fps_in=options.fps_in)
    return open_video(video, silent=options.silent, sound=options.sound)


def result_name(video: Path) -> str:
    """Name of the folder of a video's results: its own, without suffix."""
    name = video.resolve().name if video.is_dir() else video.stem
    return name or "video"


def predict_masks(
    model: PredictionModel,
    source: Source,
    store: MaskStore,
    folder: Path,
    options: Options,
    fps: float,
    meter: Meter,
) -> tuple[Envelope, float]:
    """The first pass: masks into the store, and as PNG where asked for.

    Returns:
        The envelope of the sound, and the end of the pictures in seconds.
    """
    rate = source.sound_file.rate if source.sound_file is not None else 16_000
    envelope = Envelope(rate)
    windows = SoundWindows(source.sound(), rate, envelope)
    samples = model.front_end.length(1, rate)
    report = meter.begin("masks", source.duration)
    images: list[npt.NDArray[np.uint8]] = []
    patches: list[torch.Tensor] = []
    times: list[float] = []
    end = End()

    def flush() -> None:
        if times:
            masks = model.masks(np.stack(images), torch.cat(patches))
            for time, mask in zip(times, masks, strict=True):
                _keep(store, folder, model, source, options, time, mask)
            for each in (images, patches, times):
                each.clear()

    for index, time, frame in at_times(source.frames(), fps, end, report):
        if index < store.count:
            continue
        sound = windows.window(time - MIDDLE, samples)
        patches.append(model.front_end.patches(sound, rate, 1))
        images.append(model_frame(frame, source, model))
        times.append(time)
        if len(times) == model.num_frames:
            flush()
    flush()
    if store.count == 0:
        raise DataError(source.damage.message or f"{source.path}: no picture can be decoded.")
    windows.finish()
    source.check_end(end.seconds, envelope.seconds)
    return envelope, end.seconds


@dataclass
class End:
    """The end of the pictures read so far, seconds."""

    seconds: float = 0.0


def time_of(index: int, fps: float) -> float:
    """Time of a mask's picture, seconds."""
    return (index + MIDDLE) / fps


def at_times(frames: Iterator[Frame], fps: float, end: End, report: Report) -> Iterator[tuple[int, float, Frame]]:
    """The pictures shown at the times of the masks: (number of the mask, its time, picture), at least one.

    Args:
        frames: in order.
        fps: masks per second.
        end: receives the end of the pictures.
        report: receives the time reached.
    """
    shown: Frame | None = None
    index = 0
    for frame in frames:
        while shown is not None and time_of(index, fps) < frame.time - EPSILON:
            yield index, time_of(index, fps), shown
            index += 1
        shown, end.seconds = frame, frame.time + frame.duration
        report(frame.time)
    while shown is not None and (index == 0 or time_of(index, fps) < end.seconds):
        yield index, time_of(index, fps), shown
        index += 1


def model_frame(frame: Frame, source: Source, model: PredictionModel) -> npt.NDArray[np.uint8]:
    """A picture upright and of the model's size, (H, W, 3), resized as in training."""
    pixels = np.ascontiguousarray(source.orientation.apply(frame.picture.to_ndarray(format="rgb24")))
    return np.asarray(model.placement.apply(Image.fromarray(pixels), Image.Resampling.BILINEAR))


class Timeline:
    """The masks of the pictures, read in order from a store.

    Args:
        masks: predicted, in order.
        fps: predictions per second.
        blend: between two predictions, instead of holding each for its time.
    """

    def __init__(self, masks: Iterator[Planes], fps: float, *, blend: bool) -> None:
        self.fps, self.blend = fps, blend
        self._masks = masks
        self._before = next(masks)
        self._after = next(masks, None)
        self._index = 0

    def at(self, time: float) -> tuple[float, Planes]:
        """The mask at a time, seconds, and a number that is the same for the same mask. Times must not decrease."""
        position = time * self.fps + EPSILON - (MIDDLE if self.blend else 0)
        while self._after is not None and position >= self._index + 1:
            self._before, self._after = self._after, next(self._masks, None)
            self._index += 1
        share = position - self._index
        if not self.blend or self._after is None or share <= 0:
            return float(self._index), self._before
        return self._index + share, blended(self._before, self._after, share)


def paint(
    source: Source,
    store: MaskStore,
    folder: Path,
    options: Options,
    fps: float,
    envelope: Envelope,
    seconds: float,
    meter: Meter,
) -> None:
    """The second pass: the overlay, and the video of masks where asked for."""
    width, height = even(source.width), even(source.height)
    peaks = envelope.columns(width, seconds)
    strip = draw_strip(width, strip_height(height), peaks, shares(store, width, fps, seconds))
    timeline = Timeline(store.masks(), fps, blend=options.between == "blend")
    report = meter.begin("overlay", seconds)
    with contextlib.ExitStack() as stack:
        overlay = stack.enter_context(
            OverlayWriter(stack.enter_context(atomic_path(folder / OVERLAY)), source, strip, seconds)
        )
        track = None
        if options.masks == "video":
            container, track = open_masks_video(stack.enter_context(atomic_path(folder / MASKS_VIDEO)), source)
            stack.callback(container.close)
        key, tint = -1.0, Tint(None)
        for frame in source.frames():
            number, mask = timeline.at(frame.time)
            if number != key:
                key, tint = number, Tint.of(mask, width, height, options.threshold)
            overlay.write(frame, tint)
            if track is not None:
                track.write(mask_picture(mask, source), frame.time, frame.duration)
            report(frame.time)
        if track is not None:
            track.close()


def shares(store: MaskStore, width: int, fps: float, seconds: float) -> npt.NDArray[np.float32]:
    """The painted share per column of a strip, (width,): the largest of the masks that a column covers."""
    out = np.zeros(width, np.float32)
    for index, record in enumerate(store.records()):
        first = int(index / fps / max(seconds, EPSILON) * width)
        last = max(first + 1, int((index + 1) / fps / max(seconds, EPSILON) * width))
        last = width if index == store.count - 1 else last
        out[first:last] = np.maximum(out[first:last], record["painted"])
    return out


def check_disk(folder: Path, source: Source, options: Options, fps: float, size: tuple[int, int]) -> None:
    """Compare the free disk with an estimate of what will be written.

    Raises:
        DataError: there is too little.
    """
    pixels = source.width * source.height
    seconds = source.duration if source.duration is not None else 600.0
    per_second = 0.015 * pixels * source.rate + 50_000 + fps * size[0] * size[1] / 4
    per_second += {"png": 0.05 * pixels * fps, "video": 0.1 * pixels * source.rate, "none": 0.0}[options.masks]
    needed = round(seconds * per_second) + SPARE_BYTES
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DataError(
            f"{folder} has {free / 1e6:,.0f} MB free, and {source.path} needs about {needed / 1e6:,.0f} MB: make room, "
            "choose another folder with --out DIR, or write fewer masks (--masks none)."
        )


def write_result(path: Path, header: Mapping[str, Any], store: MaskStore) -> None:
    """Write the report: the header, and a line per mask, without holding all of them in memory."""
    with atomic_path(path) as part, part.open("w") as file:
        file.write(json.dumps(header, indent=2)[:-2] + ',\n  "masks": [')
        for index, record in enumerate(store.records()):
            file.write(("," if index else "") + "\n    " + json.dumps(record))
        file.write("\n  ]\n}\n")


def versions() -> dict[str, str]:
    """Versions of what takes part."""
    codec = av.library_versions["libavcodec"]
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "av": av.__version__,
        "libavcodec": ".".join(map(str, codec)),
    }


def _keep(
    store: MaskStore,
    folder: Path,
    model: PredictionModel,
    source: Source,
    options: Options,
    time: float,
    mask: Planes,
) -> None:
    painted, classes = areas(mask, options.threshold)
    record: dict[str, Any] = {"time": round(time, 6), "painted": round(painted, 6)}
    if model.semantic:
        record["classes"] = {model.classes[index]: round(area, 6) for index, area in classes.items()}
    if options.masks == "png":
        record["file"] = f"{MASKS}/{round(time * 1000):06d}.png"
        save_mask(folder / record["file"], mask, source.width, source.height, options.threshold)
    store.append(record, mask)


def _wanted(model: PredictionModel, video: Path, options: Options) -> dict[str, Any]:
    """The options in the form in which they are stored and compared."""
    return {
        "video": _identity(video),
        **asdict(options),
        "sound": _identity(options.sound) if options.sound is not None else None,
        "model": model.description,
    }


def _identity(path: Path) -> str:
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    status = [file.stat() for file in files]
    newest = max((s.st_mtime_ns for s in status), default=0)
    return f"{path.name}, {sum(s.st_size for s in status)} bytes, {newest / 1e9:.6f}"


def _finished(folder: Path, wanted: Mapping[str, Any], options: Options) -> Prediction | None:
    """The results of an earlier call with the same options, if there are any."""
    try:
        report = json.loads((folder / RESULT).read_text())
        made, count = report["options"], len(report["masks"])
        seconds, damage = report["seconds"], report["damage"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    refuse_other_options(folder, made, wanted)
    return _prediction(folder, options, count, seconds, damage)


def _prediction(folder: Path, options: Options, count: int, seconds: float, damage: str) -> Prediction:
    masks = {"png": folder / MASKS, "video": folder / MASKS_VIDEO, "none": None}[options.masks]
    return Prediction(folder, folder / OVERLAY, folder / RESULT, masks, count, seconds, damage)


def _clear(folder: Path) -> None:
    """Remove what `predict` writes, and nothing else."""
    from scripts.prediction.store import BYTES, LINES

    for name in (RESULT, OVERLAY, MASKS_VIDEO, LINES, BYTES):
        (folder / name).unlink(missing_ok=True)
    for path in (folder / MASKS).glob("*.png"):
        if path.stem.isdecimal():
            path.unlink()
