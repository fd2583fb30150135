"""Example clips of the page, made at its start: from the test clips of the stamps, else from drawn things."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image

from scripts.data.stamps import layouts
from scripts.data.stamps.library import drawn_library
from scripts.prediction.media import open_media
from scripts.prediction.overlay import Track
from utils.errors import DataError

COUNT = 4
RATE = 10  # pictures per second; each picture of a clip stays for a second
DRAWN_SIZE = 128


@dataclass(frozen=True)
class Example:
    """A clip to try.

    Attributes:
        label: what sounds in it, and what is only seen.
        sounds: what sounds in it.
        video: an .mp4 with sound.
        wave: its sound.
    """

    label: str
    sounds: str
    video: Path
    wave: Path


def make_examples(folder: Path, stamps: Path, count: int = COUNT) -> list[Example]:
    """Make example clips.

    Args:
        folder: for their files.
        stamps: data of `scripts/data/make_stamps.py`; where its ms3 is not there, drawn clips are made.
        count: of clips.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not layouts.table(stamps, "ms3").is_file() or not layouts.sound_labels(stamps, "ms3").is_file():
        stamps = folder / "drawn"
        _draw(stamps, count)
    data = layouts.table(stamps, "ms3").parent
    content = json.loads(layouts.sound_labels(stamps, "ms3").read_text())["clips"]
    with layouts.table(stamps, "ms3").open(newline="") as file:
        names = [row["name"] for row in csv.DictReader(file) if row["split"] == "test"]
    made = []
    for number, name in enumerate(_chosen(names, content, count), start=1):
        video, wave = folder / f"example_{number}.mp4", folder / f"example_{number}.wav"
        frames = sorted((data / "ms3_data" / "visual_frames" / name).glob("*.png"), key=_number)
        samples, rate = soundfile.read(
            data / "ms3_data" / "audio_wav" / "test" / f"{name}.wav", dtype="float32", always_2d=True
        )
        samples = samples[: len(frames) * rate]
        soundfile.write(wave, samples, rate, "PCM_16")
        _write_video(video, frames, samples, rate)
        sounding = content[name]["sounding"]
        silent = [kind for kind in content[name]["visible"] if kind not in sounding]
        sounds = " and ".join(sounding)
        made.append(
            Example(sounds + (f", beside silent {' and '.join(silent)}" if silent else ""), sounds, video, wave)
        )
    if not made:
        raise DataError(f"{data} holds no test clips: remove it, and it is made anew.")
    return made


def _chosen(names: list[str], content: dict[str, dict[str, list[str]]], count: int) -> list[str]:
    """Clips of different sounds, those with something silent beside it first."""
    known = [name for name in names if content.get(name, {}).get("sounding")]
    known.sort(key=lambda name: (len(content[name]["sounding"]) > 1, len(content[name]["visible"]) < 2))
    chosen: list[str] = []
    heard: set[str] = set()
    for name in [*known, *known]:
        if len(chosen) < count and name not in chosen and (not heard.intersection(content[name]["sounding"])):
            chosen.append(name)
            heard.update(content[name]["sounding"])
    return chosen


def _draw(root: Path, count: int) -> None:
    library = drawn_library(4, seed=0)
    names = [kind.name for kind in library.kinds]
    orders = [order for order in layouts.orders("ms3", (1, 1, 2 * count), names, seed=0) if order.split == "test"]
    for order in orders:
        layouts.make(root, order, library, size=DRAWN_SIZE, seed=0)
    layouts.write_sound_labels(root, "ms3", orders, names, unseen=(), seed=0)
    layouts.write_tables(root, "ms3", orders, names)


def _write_video(target: Path, frames: list[Path], samples: np.ndarray, rate: int) -> None:
    """Pictures of a second each, with their sound."""
    pictures = [Image.open(frame).convert("RGB") for frame in frames]
    width, height = (2 * side for side in pictures[0].size)  # small ones are hard to see
    with av.open(str(target), "w", format="mp4", options={"movflags": "faststart"}) as container:
        options = {"preset": "veryfast", "crf": "14", "bf": "0"}
        track = Track(container, "libx264", width, height, RATE, "yuv420p", options)
        sound = container.add_stream("aac", rate=rate, layout="mono")
        for second, picture in enumerate(pictures):
            shown = av.VideoFrame.from_image(picture.resize((width, height), Image.Resampling.BICUBIC))
            for part in range(RATE):
                track.write(shown.reformat(format="yuv420p"), second + part / RATE, 1 / RATE)
        track.close()
        piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.mean(axis=1)[None]), "fltp", "mono")
        piece.rate, piece.pts = rate, 0
        container.mux(sound.encode(piece))
        container.mux(sound.encode(None))
    with open_media(target):
        pass


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])
