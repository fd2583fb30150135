"""What AVSBench hands out, for the message of a run that finds no data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SOURCE = "https://github.com/OpenNLPLab/AVSBench"
STAMPS_CONFIG = "config/{task}/MoDAT_lite0_{task}_stamps.py"
RELEASE = {"s4": "Single-source", "ms3": "Multi-sources", "avss": "AVSBench-semantic"}
TREE = {
    "s4": (
        ("anno_csv", "", "columns name (or video_id), category, split"),
        ("dir_img", "{split}/{category}/{name}/{name}_{1..5}.png", ""),
        ("dir_mask", "{split}/{category}/{name}/{name}_{1..5}.png", "in train the first only"),
        ("dir_audio_log_mel", "{split}/{category}/{name}.pkl", "or .wav in audio_wav/ beside audio_log_mel/"),
    ),
    "ms3": (
        ("anno_csv", "", "columns name (or video_id), split"),
        ("dir_img", "{name}/{name}.mp4_{1..5}.png", ""),
        ("dir_mask", "{split}/{name}/{name}_{1..5}.png", ""),
        ("dir_audio_log_mel", "{split}/{name}.pkl", "or .wav in audio_wav/ beside audio_log_mel/"),
    ),
    "avss": (
        ("meta_csv_path", "", "columns uid, split, label (v1s, v1m, v2)"),
        ("label_idx_path", "", "class names and numbers"),
        ("dir_base", "{label}/{uid}/frames/{0..}.jpg", ""),
        ("dir_base", "{label}/{uid}/labels_rgb/{0..}.png", "in v1s's train the first only"),
        ("dir_base", "{label}/{uid}/audio.wav", "or audio.pkl"),
    ),
}
"""Per task: key of the split's config, what is below it, and a remark."""


def missing_data(task: str, split: Mapping[str, Any], table: Path) -> str:
    """The message for a table that does not exist: what to ask for, where, and the tree that the config reads.

    Args:
        task: 's4', 'ms3' or 'avss'.
        split: the config of one split, whose paths the tree shows.
        table: the missing file.
    """
    if split.get("type") == "FolderDataset":
        return (
            f"{table} is missing: it lists your clips (columns name, split, video, and optionally audio, masks, ...: "
            "dataloader/README.md). Write it, or set anno_csv of dataset.train, .val and .test."
        )
    lines = []
    for key, below, remark in TREE[task]:
        path = str(Path(str(split.get(key, f"<{key}>")), below))
        lines.append(f"  {path}{'   ' if remark else ''}{remark}")
    return (
        f"{table} is missing, so the data of {task} is not there. AVSBench is handed out by its authors on request "
        f"({SOURCE} names the form and the address); ask for {RELEASE[task]}, and unpack it so that these exist:\n"
        + "\n".join(lines)
        + f"\nData elsewhere: link it there, or set these keys of dataset.train, .val and .test. Without AVSBench: "
        f"{STAMPS_CONFIG.format(task=task)} makes its own data."
    )
