"""Windows of a streamed sound, and its envelope in bounded memory."""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from scripts.prediction.source import Sound


class Envelope:
    """Peaks of a sound of any length in at most `bins` numbers.

    Each bin covers the same number of samples; when all bins are full, pairs of them are merged and a bin covers twice
    as many.

    Args:
        rate: of the sound, Hz.
        bins: even.
    """

    def __init__(self, rate: int, bins: int = 8192) -> None:
        self.rate = rate
        self.peaks = np.zeros(bins, np.float32)
        self.samples_per_bin = max(1, rate // 100)
        self.samples = 0

    def add(self, sound: Sound) -> None:
        """Take the next samples (n,)."""
        while len(sound):
            if self.samples == len(self.peaks) * self.samples_per_bin:
                half = len(self.peaks) // 2
                self.peaks[:half] = self.peaks.reshape(-1, 2).max(axis=1)
                self.peaks[half:] = 0
                self.samples_per_bin *= 2
            index = self.samples // self.samples_per_bin
            taken = (index + 1) * self.samples_per_bin - self.samples
            self.peaks[index] = max(self.peaks[index], float(np.abs(sound[:taken]).max()))
            self.samples += len(sound[:taken])
            sound = sound[taken:]

    @property
    def seconds(self) -> float:
        """Length of the sound so far."""
        return self.samples / self.rate

    def columns(self, width: int, duration: float) -> npt.NDArray[np.float32]:
        """Peaks of `width` equal parts of `duration` seconds, (width,); 0 after the end."""
        edges = np.arange(width + 1) * duration * self.rate / (width * self.samples_per_bin)
        used = -(-self.samples // self.samples_per_bin)
        out = np.zeros(width, np.float32)
        for column in range(width):
            first = int(edges[column])
            part = self.peaks[first : max(int(np.ceil(edges[column + 1])), first + 1)][: max(0, used - first)]
            out[column] = part.max(initial=0.0)
        return out


class SoundWindows:
    """Windows of a sound that arrives in pieces; what lies before the last window is forgotten.

    Args:
        pieces: (n,) each, from time 0 on.
        rate: Hz.
        envelope: receives all samples.
    """

    def __init__(self, pieces: Iterable[Sound], rate: int, envelope: Envelope) -> None:
        self.rate = rate
        self.envelope = envelope
        self._pieces: Iterator[Sound] = iter(pieces)
        self._kept: Sound = np.zeros(0, np.float32)
        self._first = 0  # number of the first sample kept

    def window(self, start: float, samples: int) -> Sound:
        """Samples (samples,) from `start` seconds on; zeros before the sound and after it.

        Starts of later calls must not be earlier.
        """
        begin = round(start * self.rate)
        self._forget(begin)
        parts, end = [self._kept], self._first + len(self._kept)
        while end < begin + samples:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self.envelope.add(piece)
            end += len(piece)
            parts.append(piece)
            if end <= begin:  # a jump over more than a piece
                parts, self._first = [], end
        self._kept = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        self._forget(begin)
        out = np.zeros(samples, np.float32)
        at = self._first - begin  # of the first kept sample in the window
        part = self._kept[: max(0, samples - at)]
        out[at : at + len(part)] = part
        return out

    def finish(self) -> None:
        """Read the sound to its end."""
        for piece in self._pieces:
            self.envelope.add(piece)

    def _forget(self, begin: int) -> None:
        dropped = min(max(0, begin - self._first), len(self._kept))
        self._kept = self._kept[dropped:]
        self._first += dropped
