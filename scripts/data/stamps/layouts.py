"""The files of a clip in AVSBench's three layouts, and how a clip is written."""

import csv
import io
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image

from dataloader.audio import SAMPLE_RATE
from dataloader.off_screen import SOUND_LABELS
from dataloader.palette import encode
from dataloader.semantic import SUBSETS, frames_of
from scripts.data.stamps.library import DRAWN_WAVEFORMS, KINDS, Library, class_names
from scripts.data.stamps.scene import Recipe, Scene, compose, draw_content
from utils.files import atomic_path

SPLITS = ("train", "val", "test", "unseen")
FOLDERS = {"s4": "Single-source", "ms3": "Multi-sources", "avss": "AVSS"}
_TABLES = {"s4": "s4_meta_data.csv", "ms3": "ms3_meta_data.csv", "avss": "metadata.csv"}
_COLUMNS = {
    "s4": ("name", "start_second", "category", "split"),
    "ms3": ("name", "split"),
    "avss": ("uid", "split", "label"),
}
_CROWDS = {"objects": (0.0, 0.4, 0.45, 0.15), "sounding": (0.6, 0.32, 0.08)}
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class Order:
    """One clip to be made: its task, split, number within the split, and class."""

    task: str
    split: str
    number: int
    kind: int
    category: str
    label: str

    @property
    def name(self) -> str:
        """The clip's name in the table."""
        return f"{self.category or self.label or 'stamps'}_{self.split}_{self.number:05d}"

    @property
    def row(self) -> tuple[str, ...]:
        """The clip's line of the table."""
        return {
            "s4": (self.name, "0", self.category, self.split),
            "ms3": (self.name, self.split),
            "avss": (self.name, self.split, self.label),
        }[self.task]


def orders(
    task: str, counts: Sequence[int], kinds: Sequence[str], seed: int, unseen: Sequence[int] = ()
) -> list[Order]:
    """All clips of a task: s4 cycles through the kinds, avss through its three subsets.

    Args:
        task: 's4', 'ms3' or 'avss'.
        counts: clips in train, val, test; unseen has as many as test.
        kinds: class names.
        seed: of the order of the kinds.
        unseen: positions of the kinds with a second instance; none = no split `unseen`.
    """
    made = []
    for split, count in zip(SPLITS, (*counts, counts[-1]), strict=True):
        positions = np.asarray(unseen if split == "unseen" else range(len(kinds)), np.int64)
        if not len(positions):
            continue
        turns = np.random.default_rng((seed, _stable(task + split))).permutation(np.arange(count) % len(positions))
        turns = positions[turns]
        for number, kind in enumerate(turns.tolist()):
            category = kinds[kind] if task == "s4" else ""
            label = tuple(SUBSETS)[number % len(SUBSETS)] if task == "avss" else ""
            made.append(Order(task, split, number, kind, category, label))
    return made


def is_made(root: Path, order: Order) -> bool:
    """Whether the clip is complete: its sound is written last."""
    return _wav(root / FOLDERS[order.task], order).is_file()


def make(root: Path, order: Order, library: Library, *, size: int, seed: int) -> None:
    """Draw one clip and write all its files.

    Args:
        root: the data folder, which holds the folder of the task.
        order: the clip.
        library: material.
        size: height and width, pixels.
        seed: of the whole data set; each clip draws from (seed, task, split, number).
    """
    recipe = _recipe(order)
    scene = compose(
        library,
        recipe,
        size=size,
        held_out=order.split != "train",
        rng=_generator(order, seed),
        first_kind=order.kind if recipe.steady else None,
        unseen=order.split == "unseen",
    )
    folder = root / FOLDERS[order.task]
    writer = _write_semantic if order.task == "avss" else _write_binary
    writer(folder, order, scene)
    buffer = io.BytesIO()
    soundfile.write(buffer, scene.sound, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    write_atomically(_wav(folder, order), buffer.getvalue())


def write_tables(root: Path, task: str, made: Iterable[Order], kinds: Sequence[str]) -> None:
    """Write the task's CSV, and for avss its class list, once all clips are written."""
    folder = root / FOLDERS[task]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS[task])
    writer.writerows(order.row for order in made)
    if task == "avss":
        names = json.dumps(class_names(tuple(kinds)), indent=1)
        write_atomically(folder / "label2idx.json", names.encode())
    write_atomically(folder / _TABLES[task], text.getvalue().encode())


def write_sound_labels(
    root: Path, task: str, made: Iterable[Order], kinds: Sequence[str], *, unseen: Sequence[int], seed: int
) -> None:
    """Write what sounds and what is visible in each clip, as `dataloader.off_screen` reads it.

    Args:
        root: the data folder.
        task: 's4', 'ms3' or 'avss'.
        made: the task's clips.
        kinds: class names.
        unseen: positions of the kinds with a second instance.
        seed: of the whole data set.
    """
    clips = {}
    for order in made:
        recipe = _recipe(order)
        visible, heard = draw_content(
            recipe,
            sorted(unseen) if order.split == "unseen" else range(len(kinds)),
            rng=_generator(order, seed),
            first_kind=order.kind if recipe.steady else None,
        )
        sounding = visible[heard.any(0)]
        clips[order.name] = {
            "sounding": sorted(kinds[kind] for kind in sounding.tolist()),
            "visible": sorted(kinds[kind] for kind in visible.tolist()),
        }
    content = {"groups": {name: _group(name, number) for number, name in enumerate(kinds)}, "clips": clips}
    write_atomically(sound_labels(root, task), (json.dumps(content, indent=1) + "\n").encode())


def sound_labels(root: Path, task: str) -> Path:
    """The task's file of sound labels."""
    return root / FOLDERS[task] / SOUND_LABELS


def table(root: Path, task: str) -> Path:
    """The task's CSV."""
    return root / FOLDERS[task] / _TABLES[task]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or absent."""
    with atomic_path(path, durable=False) as part:
        part.write_bytes(data)


def _recipe(order: Order) -> Recipe:
    steady = order.task == "s4" or order.label == "v1s"
    return Recipe(
        frames=frames_of(order.label, order.split)[0] if order.label else 5,
        objects=(0.4, 0.4, 0.2) if steady else _CROWDS["objects"],
        sounding=(1.0,) if steady else _CROWDS["sounding"],
        steady=steady,
    )


def _generator(order: Order, seed: int) -> np.random.Generator:
    return np.random.default_rng((seed, _stable(order.task), SPLITS.index(order.split), order.number))


def _group(name: str, number: int) -> str:
    """Broad group of a kind's sound: by the folder of its stamp; drawn kinds by the waveform of their sound."""
    if name not in KINDS:
        return DRAWN_WAVEFORMS[number % len(DRAWN_WAVEFORMS)]
    folder = KINDS[name]
    return "animal" if folder.startswith("animals/") else "music" if "/music/" in folder else "device"


def _stable(text: str) -> int:
    return zlib.crc32(text.encode())


def _wav(folder: Path, order: Order) -> Path:
    if order.task == "s4":
        return folder / "s4_data" / "audio_wav" / order.split / order.category / f"{order.name}.wav"
    if order.task == "ms3":
        return folder / "ms3_data" / "audio_wav" / order.split / f"{order.name}.wav"
    return folder / order.label / order.name / "audio.wav"


def _write_binary(folder: Path, order: Order, scene: Scene) -> None:
    data = folder / f"{order.task}_data"
    relative = Path(order.split, order.category, order.name)
    images = data / "visual_frames" / (relative if order.task == "s4" else order.name)
    prefix = order.name if order.task == "s4" else f"{order.name}.mp4"
    labelled = 1 if order.task == "s4" and order.split == "train" else len(scene.frames)
    _save_all(images, f"{prefix}_{{}}.png", scene.frames)
    _save_all(data / "gt_masks" / relative, f"{order.name}_{{}}.png", _binary(scene.sounding_objects()[:labelled]))
    _save_all(data / "all_objects" / relative, f"{order.name}_{{}}.png", _binary(scene.all_objects()))


def _write_semantic(folder: Path, order: Order, scene: Scene) -> None:
    clip = folder / order.label / order.name
    _, labelled = frames_of(order.label, order.split)
    _save_all(clip / "frames", "{}.jpg", scene.frames, first=0)
    _save_all(clip / "labels_rgb", "{}.png", encode(scene.sounding_objects()[:labelled]), first=0)
    _save_all(clip / "all_objects_rgb", "{}.png", encode(scene.all_objects()), first=0)


def _binary(classes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.where(classes > 0, 255, 0).astype(np.uint8)


def _save_all(folder: Path, pattern: str, images: npt.NDArray[np.uint8], *, first: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, start=first):
        Image.fromarray(image).save(folder / pattern.format(number), quality=_JPEG_QUALITY)
