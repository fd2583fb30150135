"""`predict`: from a video with sound to masks, an overlay and a report.

Two passes over the video keep memory flat. The first reads pictures and sound, predicts masks and stores them
(`store.py`); the second reads the pictures again and paints them, with a strip whose time axis is then known.
`timing.py` says which picture and which sound belong to a mask.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console

from scripts.prediction.masks import Tint, areas, save_mask
from scripts.prediction.media import reason
from scripts.prediction.meter import Meter
from scripts.prediction.model import Planes, PredictionModel
from scripts.prediction.options import Options, as_stored
from scripts.prediction.overlay import (
    OverlayWriter,
    draw_strip,
    even,
    mask_picture,
    open_masks_video,
    strip_height,
)
from scripts.prediction.pictures import PICTURES, open_pictures
from scripts.prediction.results import (
    LOCK,
    MASKS,
    MASKS_VIDEO,
    OVERLAY,
    RESULT,
    Prediction,
    check_disk,
    clear,
    find_finished,
    prediction,
    versions,
    write_result,
)
from scripts.prediction.sound import Envelope, SoundWindows
from scripts.prediction.source import Frame, Source
from scripts.prediction.store import MaskStore
from scripts.prediction.timing import EPSILON, MIDDLE, End, Timeline, at_times
from scripts.prediction.video import open_video
from utils.errors import DataError
from utils.files import atomic_path
from utils.runtime import file_lock

NAMED_SHARE = 0.005
"""Classes with less of the picture are not named in the overlay."""


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
    options = dataclasses.replace(options or Options(), **changes)
    video = Path(video)
    folder = Path(out) / result_name(video)
    if not video.exists():
        raise DataError(f"{video} does not exist.")
    wanted = as_stored(options, video, model.description)
    finished = None if overwrite else find_finished(folder, wanted, options)
    if finished is not None:
        return finished
    source = open_source(video, options)
    fps = min(options.fps, source.rate)
    check_disk(folder, source, options, fps, model.size)
    try:
        with file_lock(folder / LOCK):  # a second process with the same folder waits, and finds the results
            clear(folder, everything=overwrite)
            finished = find_finished(folder, wanted, options)
            if finished is not None:
                return finished
            with contextlib.closing(MaskStore(folder, wanted, (2 if model.semantic else 1, *model.size))) as store:
                with Meter(folder.name, console) as meter:
                    envelope, seconds = predict_masks(model, source, store, folder, options, fps, meter)
                    paint(model, source, store, folder, options, fps, envelope, seconds, meter)
                header = {
                    "seconds": round(seconds, 3),
                    "width": source.width,
                    "height": source.height,
                    "masks_per_second": fps,
                    "damage": source.damage.message,
                    "precision": model.precision,
                    "options": wanted,
                    "versions": versions(),
                }
                write_result(folder / RESULT, header, store)
                store.remove()
    except BrokenPipeError:  # of the terminal
        raise
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({error.strerror or error}); make room and run the same command, which goes "
            "on where it stopped."
        ) from error
    except av.FFmpegError as error:
        raise DataError(f"{folder / OVERLAY} cannot be written ({reason(error)}).") from error
    return prediction(folder, options, store.count, seconds, source.damage.message)


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


def model_frame(frame: Frame, source: Source, model: PredictionModel) -> npt.NDArray[np.uint8]:
    """A picture upright and of the model's size, (H, W, 3), resized as in training."""
    pixels = np.ascontiguousarray(source.orientation.apply(frame.picture.to_ndarray(format="rgb24")))
    return np.asarray(model.placement.apply(Image.fromarray(pixels), Image.Resampling.BILINEAR))


def paint(
    model: PredictionModel,
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
            OverlayWriter(stack.enter_context(atomic_path(folder / OVERLAY)), source, strip, seconds, model.classes)
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
                painted = areas(mask, options.threshold)[1]
                overlay.legend([index for index in painted if painted[index] >= NAMED_SHARE])
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
