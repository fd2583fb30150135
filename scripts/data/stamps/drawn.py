"""Small drawn data sets in AVSBench's layouts, for tests and for `train.sh --smoke`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.data.stamps import layouts
from scripts.data.stamps.library import class_names, drawn_library

TYPES = {"s4": "S4Dataset", "ms3": "MS3Dataset", "avss": "AVSSDataset"}

KINDS = 4
"""Kinds of objects, class numbers 1 to 4."""


def draw(root: Path, tasks: Sequence[str], *, clips: Sequence[int], size: int, sound_labels: bool = True) -> None:
    """Draw data sets, in this process.

    Args:
        root: the data folder.
        tasks: some of 's4', 'ms3', 'avss'.
        clips: in train, val and test.
        size: height and width, pixels.
        sound_labels: write `sound_labels.json`, for off-screen sounds.
    """
    seed = 0
    library = drawn_library(KINDS, seed=seed)
    names = [kind.name for kind in library.kinds]
    for task in tasks:
        orders = layouts.orders(task, clips, names, seed=seed)
        for order in orders:
            layouts.make(root, order, library, size=size, seed=seed)
        if sound_labels:
            layouts.write_sound_labels(root, task, orders, names, unseen=(), seed=seed)
        layouts.write_tables(root, task, orders, names)


def write_classes(root: Path, classes: int) -> None:
    """Give drawn data of avss another number of classes, background included."""
    names = tuple(kind.name for kind in drawn_library(KINDS, seed=0).kinds)
    path = root / layouts.FOLDERS["avss"] / "label2idx.json"
    layouts.write_atomically(path, json.dumps(class_names(names, classes)).encode())


def paths(root: Path, task: str) -> dict[str, Any]:
    """`type` and paths of a split's config, for data in a folder."""
    base = root / layouts.FOLDERS[task]
    table = str(layouts.table(root, task))
    if task == "avss":
        return {
            "type": TYPES[task],
            "meta_csv_path": table,
            "label_idx_path": str(base / "label2idx.json"),
            "dir_base": str(base),
        }
    data = base / f"{task}_data"
    return {
        "type": TYPES[task],
        "anno_csv": table,
        "dir_img": str(data / "visual_frames"),
        "dir_audio_log_mel": str(data / "audio_log_mel"),
        "dir_mask": str(data / "gt_masks"),
    }
