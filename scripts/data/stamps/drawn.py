"""Small drawn data sets in AVSBench's layouts, for tests and for `train.sh --smoke`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.data.stamps import layouts
from scripts.data.stamps.library import drawn_library

TYPES = {"s4": "S4Dataset", "ms3": "MS3Dataset", "avss": "AVSSDataset"}


def draw(
    root: Path, tasks: Sequence[str], *, clips: Sequence[int], size: int, kinds: int = 4, sound_labels: bool = True
) -> None:
    """Draw data sets, in this process.

    Args:
        root: the data folder.
        tasks: some of 's4', 'ms3', 'avss'.
        clips: in train, val and test.
        size: height and width, pixels.
        kinds: of objects.
        sound_labels: write `sound_labels.json`, for off-screen sounds.
    """
    seed = 0
    library = drawn_library(kinds, seed=seed)
    names = [kind.name for kind in library.kinds]
    for task in tasks:
        orders = layouts.orders(task, clips, names, seed=seed)
        for order in orders:
            layouts.make(root, order, library, size=size, seed=seed)
        if sound_labels:
            layouts.write_sound_labels(root, task, orders, names, unseen=(), seed=seed)
        layouts.write_tables(root, task, orders, names)


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
