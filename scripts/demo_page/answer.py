"""What a model paints in a clip with one sound: computed once, drawn again for each threshold and colour."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from scripts.demo_page.clip import Clip
from scripts.prediction.masks import OBJECT_COLOUR, RGB, Tint, areas
from scripts.prediction.meter import Meter, Report
from scripts.prediction.model import Planes, PredictionModel
from scripts.prediction.options import Options
from scripts.prediction.overlay import OverlayWriter, draw_strip, strip_height
from scripts.prediction.run import NAMED_SHARE, predict_masks
from scripts.prediction.store import MaskStore
from scripts.prediction.timing import MIDDLE, Timeline, time_of
from scripts.prediction.video import open_video
from utils.errors import DataError

Progress = Callable[[float, str], None]
"""Receives the share that is done, 0 to 1, and of what."""


@dataclass(frozen=True)
class Look:
    """How masks are drawn.

    Attributes:
        threshold: of the painted probability, 0 to 1.
        colour: red, green, blue; None: orange, or the colours of the classes.
    """

    threshold: float = 0.5
    colour: RGB | None = None


@dataclass(frozen=True)
class Answer:
    """A model's masks of a clip with one sound, of n moments.

    Attributes:
        sound: the sound; None: silence.
        fps: masks per second; `timing.py` says which moment each stands for.
        masks: (n, P, h, w) uint8, as PredictionModel.masks.
        frames: (n, h, w, 3) uint8, as the model sees them.
        log_mels: (n, *front_end.shape) float32, as the model hears them.
        front_end: name of the front end.
        peaks: of the sound per column of the clip's width, (width,).
        classes: names by class index.
    """

    sound: Path | None
    fps: float
    masks: Planes
    frames: npt.NDArray[np.uint8]
    log_mels: npt.NDArray[np.float32]
    front_end: str
    peaks: npt.NDArray[np.float32]
    classes: list[str]

    def shares(self, threshold: float) -> npt.NDArray[np.float32]:
        """Painted share of each picture, (n,)."""
        return np.array([areas(mask, threshold)[0] for mask in self.masks], np.float32)

    def index(self, moment: float) -> int:
        """Number of the mask that is shown at a moment, seconds."""
        return min(max(0, int(moment * self.fps + 1e-6)), len(self.masks) - 1)

    def window_start(self, index: int) -> float:
        """Start of the sound that belongs to a mask, seconds."""
        return time_of(index, self.fps) - MIDDLE


class _Recorder(PredictionModel):
    """A model that keeps what it was given."""

    def __init__(self, model: PredictionModel) -> None:
        self.__dict__.update(model.__dict__)
        self.frames: list[npt.NDArray[np.uint8]] = []
        self.log_mels: list[npt.NDArray[np.float32]] = []

    def masks(self, frames: npt.NDArray[np.uint8], log_mel: Tensor) -> Planes:
        self.frames.append(frames)
        self.log_mels.append(log_mel.numpy())
        return super().masks(frames, log_mel)


class _Meter(Meter):
    def __init__(self, progress: Progress | None) -> None:
        super().__init__("", None)
        self.progress = progress

    def begin(self, what: str, duration: float | None) -> Report:
        progress = self.progress
        if progress is None or not duration:
            return lambda done: None
        return lambda done: progress(min(1.0, done / duration), what)


def answer(
    model: PredictionModel, clip: Clip, sound: Path | None, fps: float, progress: Progress | None = None
) -> Answer:
    """Run a model over a clip.

    Args:
        model: from `load_for_prediction`.
        clip: from `read_clip`.
        sound: a sound file; None: silence.
        fps: masks per second.
        progress: see Progress.
    """
    source = open_video(clip.pictures, silent=True, sound=sound)
    recorder = _Recorder(model)
    options = Options(fps=fps, masks="none", silent=True, sound=sound)
    fps = min(fps, source.rate)
    with tempfile.TemporaryDirectory(dir=clip.pictures.parent) as folder:
        store = MaskStore(Path(folder), {}, (2 if model.semantic else 1, *model.size))
        try:
            envelope, _ = predict_masks(recorder, source, store, Path(folder), options, fps, _Meter(progress))
            masks = np.stack(list(store.masks()))
        finally:
            store.close()
    return Answer(
        sound=sound,
        fps=fps,
        masks=masks,
        frames=np.concatenate(recorder.frames),
        log_mels=np.concatenate(recorder.log_mels),
        front_end=model.front_end.name,
        peaks=envelope.columns(clip.width, clip.seconds),
        classes=model.classes,
    )


def draw_overlay(answered: Answer, clip: Clip, look: Look, target: Path) -> None:
    """Write the clip with its masks painted in and the answer's sound, as .mp4. The model is not needed.

    Raises:
        DataError: the clip's files are gone.
    """
    if not clip.pictures.is_file():
        raise DataError(f"{clip.name} is not here any more: upload it again.")
    source = replace(open_video(clip.pictures, silent=True, sound=answered.sound), width=clip.width, height=clip.height)
    shares = answered.shares(look.threshold)
    times = (np.arange(clip.width) + 0.5) / clip.width * clip.seconds
    columns = shares[[answered.index(float(time)) for time in times]]
    height = strip_height(clip.height)
    strip = draw_strip(clip.width, height, answered.peaks, columns, look.colour or OBJECT_COLOUR)
    timeline = Timeline(iter(answered.masks), answered.fps, blend=False)
    classes = answered.classes if look.colour is None else ()
    key, tint = -1.0, Tint(None)
    with OverlayWriter(target, source, strip, clip.seconds, classes) as overlay:
        for frame in source.frames():
            number, mask = timeline.at(frame.time)
            if number != key:
                key, tint = number, Tint.of(mask, clip.width, clip.height, look.threshold, look.colour)
                if classes:
                    painted = areas(mask, look.threshold)[1]
                    overlay.legend([index for index in painted if painted[index] >= NAMED_SHARE])
            overlay.write(frame, tint)
