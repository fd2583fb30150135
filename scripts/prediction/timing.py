"""Which picture and which sound belong to a mask, and which mask to a picture.

Mask k of F masks per second stands for the pictures from k / F to (k + 1) / F seconds. The model sees the picture shown
at t = (k + 0.48) / F and the sound from t - 0.48 seconds on. At F = 1 that is the alignment of training: the sound of
second k starts at k seconds (dataloader/front_ends.py) and lasts 0.96 s (VGGish: 0.975 s), and the picture is taken in
its middle. AVSBench has one picture per second, without a note from which moment of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from scripts.prediction.masks import blended
from scripts.prediction.meter import Report
from scripts.prediction.model import Planes
from scripts.prediction.source import Frame

MIDDLE = 0.48  # seconds from the start of a window of sound to its picture
EPSILON = 1e-6  # seconds, or parts of an interval


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
