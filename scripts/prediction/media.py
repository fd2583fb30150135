"""Decoding of containers with PyAV, and sounds on the clock of the pictures.

Sound before time 0 is left out; gaps in it are silence.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from dataloader.video import open_media, reason, sound_rate
from scripts.prediction.source import Damage, Sound, SoundFile
from utils.errors import DataError

MAX_DAMAGED_PACKETS = 200
GAP = 0.02  # seconds; smaller differences between sound and its time stamps are rounding
JUMP = 600.0  # seconds; larger jumps are faults of the time stamps
RESET = 1.0  # seconds; sounds that lie this much before what was read begin anew
PIECE = 1.0  # seconds of silence at a time


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


__all__ = [
    "JUMP",
    "decode",
    "open_media",
    "open_sound",
    "read_channels",
    "read_sound",
    "reason",
    "silence",
    "sound_length",
    "sound_rate",
]
