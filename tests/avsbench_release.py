"""A made-up AVSBench in the forms in which it is handed out, tiny."""

import csv
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from dataloader.audio import wave_log_mel
from dataloader.palette import encode, palette
from tests.videos import make_video, tone

CLASSES = {"background": 0, "dog": 18, "violin": 69, "woman": 70}
NAMES = {"train": ("-a_b1", "clip.2", "c3"), "val": ("d4", "e5"), "test": ("f6",)}
CATEGORY = "dog_barking"
SIZE = (48, 32)


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def classes(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """(H, W) uint8 class indices: two objects, or none for each fifth seed."""
    width, height = size
    found = np.zeros((height, width), np.uint8)
    if seed % 5:
        found[height // 4 : height // 2, 3 + seed % 7 : width // 2] = 18
        found[height // 2 : -3, width // 2 : width - 5] = 70
    return found


def save(image: Image.Image, path: Path, **options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def wave(path: Path, seconds: float, seed: int, rate: int = 16_000, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 0.1, (round(seconds * rate), channels))
    soundfile.write(path, noise, rate, subtype="PCM_16")


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def listed() -> list[tuple[str, str, int]]:
    """(split, name, number) of all clips."""
    pairs = [(split, name) for split, names in NAMES.items() for name in names]
    return [(split, name, number) for number, (split, name) in enumerate(pairs)]


def make_object(root: Path, task: str, *, pkl: bool = False, channels: int = 1, rate: int = 16_000) -> Path:
    """Single-source or Multi-sources as processed data."""
    folder = root / {"s4": "Single-source", "ms3": "Multi-sources"}[task]
    data = folder / f"{task}_data"
    for split, name, number in listed():
        stem = Path(split, CATEGORY, name) if task == "s4" else Path(split, name)
        frames = data / "visual_frames" / (stem if task == "s4" else name)
        for k in range(1, 6):
            save(picture(10 * number + k), frames / f"{name}{'' if task == 's4' else '.mp4'}_{k}.png")
            if task == "ms3" or split != "train" or k == 1:
                mask = Image.fromarray((classes(10 * number + k) > 0).astype(np.uint8) * 255)
                save(mask, data / "gt_masks" / stem / f"{name}_{k}.png")
        sound = data / "audio_wav" / stem.with_name(f"{name}.wav")
        wave(sound, 5, number, rate, channels)
        if pkl:
            path = data / "audio_log_mel" / stem.with_name(f"{name}.pkl")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(wave_log_mel(sound, patches=5) + 0.5))
    write_object_table(folder, task)
    return root


def write_object_table(folder: Path, task: str) -> None:
    if task == "s4":
        rows: list[tuple[object, ...]] = [("name", "start_second", "category", "split")]
        rows += [(name, number, CATEGORY, split) for split, name, number in listed()]
    else:
        rows = [("video_id", "split"), *((name, split) for split, name, _ in listed())]
    write_csv(folder / f"{task}_meta_data.csv", rows)


def make_object_videos(root: Path, task: str) -> Path:
    """The same where only videos, masks and tables are there."""
    make_object(root, task)
    folder = root / {"s4": "Single-source", "ms3": "Multi-sources"}[task]
    data = folder / f"{task}_data"
    for name in ("visual_frames", "audio_wav"):
        (data / name).rename(root.parent / f"{root.name}_{task}_{name}")
    for split, name, number in listed():
        videos = data / "raw_videos" / (Path(split, CATEGORY) if task == "s4" else "")
        videos.mkdir(parents=True, exist_ok=True)
        clip_video(videos / f"{name}.mp4", 5, number)
    return root


def clip_video(path: Path, seconds: int, seed: int) -> None:
    pictures = [np.array(picture(10 * seed + k)) for k in range(seconds)]
    make_video(
        path,
        size=SIZE,
        times=range(0, 1000 * seconds, 100),
        picture=lambda index: pictures[index // 10],
        sound=tone(seconds, 16_000),
        codec="mpeg4",
    )


def make_semantic(
    root: Path, *, masks: str = "rgb", videos: bool = False, subsets: Sequence[str] = ("v1s", "v1m", "v2")
) -> Path:
    """AVSBench-semantic. `masks`: 'rgb' (labels_rgb too) or 'semantic' (labels_semantic alone)."""
    base = root / "AVSBench-semantic"
    rows: list[tuple[object, ...]] = [("vid", "uid", "s_min", "s_sec", "a_obj", "split", "label")]
    for label in subsets:
        length = 10 if label == "v2" else 5
        for split, name, number in listed():
            vid = f"{label}{name}"
            uid = f"{vid}_{1000 * number}_{1000 * (number + length)}"
            folder = base / label / uid
            count = 1 if label == "v1s" and split == "train" else length
            for k in range(length):
                if not videos:
                    save(picture(10 * number + k), folder / "frames" / f"{k}.jpg", quality=90)
                if k < count:
                    found = classes(10 * number + k)
                    save(indexed(found), folder / "labels_semantic" / f"{k}.png")
                    if masks == "rgb":
                        save(Image.fromarray(encode(found)), folder / "labels_rgb" / f"{k}.png")
            if videos:
                clip_video(folder / "video.mp4", length, number)
            else:
                wave(folder / "audio.wav", length, number)
            rows.append((vid, uid, 0, number, "dog_woman", split, label))
    write_csv(base / "metadata.csv", rows)
    names = {f"class{number}": number for number in range(71)}
    names = {name: number for name, number in names.items() if number not in CLASSES.values()} | CLASSES
    (base / "label2idx.json").write_text(json.dumps(names))
    return root


def indexed(found: np.ndarray) -> Image.Image:
    image = Image.fromarray(found)
    if found.max() > 20:  # either way of storing indices
        image = image.convert("P")
        image.putpalette(palette(255).tobytes())
    return image
