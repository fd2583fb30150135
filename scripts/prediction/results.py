"""The folder of results of one video: what is in it, whether it is finished, and whether it will fit on the disk."""

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import torch

from scripts.prediction.options import Options
from scripts.prediction.source import Source
from scripts.prediction.store import BYTES, LINES, MaskStore, refuse_other_options
from utils.errors import DataError
from utils.files import atomic_path

RESULT, OVERLAY, MASKS, MASKS_VIDEO = "result.json", "overlay.mp4", "masks", "masks.mov"
LOCK = ".lock"
SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Prediction:
    """What was written for one video.

    Attributes:
        folder: of the results.
        overlay: the video, with masks and sound.
        result: the report, JSON.
        masks: the folder of PNGs, the video of masks, or None.
        count: predicted masks.
        seconds: length of the pictures.
        damage: what was wrong with the file; empty for a whole one. The results then end at the break.
    """

    folder: Path
    overlay: Path
    result: Path
    masks: Path | None
    count: int
    seconds: float
    damage: str


def find_finished(folder: Path, wanted: Mapping[str, Any], options: Options) -> Prediction | None:
    """The results of an earlier call with the same options, if there are any."""
    try:
        report = json.loads((folder / RESULT).read_text())
        made, count = report["options"], len(report["masks"])
        seconds, damage = report["seconds"], report["damage"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    refuse_other_options(folder, made, wanted)
    return prediction(folder, options, count, seconds, damage)


def prediction(folder: Path, options: Options, count: int, seconds: float, damage: str) -> Prediction:
    """The results in a folder."""
    masks = {"png": folder / MASKS, "video": folder / MASKS_VIDEO, "none": None}[options.masks]
    return Prediction(folder, folder / OVERLAY, folder / RESULT, masks, count, seconds, damage)


def clear(folder: Path, *, everything: bool) -> None:
    """Remove unfinished files of a killed process, and with `everything` all that `predict` writes; nothing else."""
    for name in (OVERLAY, MASKS_VIDEO, RESULT):
        for path in folder.glob(f".{name}.*.part"):
            path.unlink(missing_ok=True)
    if everything:
        for name in (RESULT, OVERLAY, MASKS_VIDEO, LINES, BYTES):
            (folder / name).unlink(missing_ok=True)
        for path in (folder / MASKS).glob("*.png"):
            if path.stem.isdecimal():
                path.unlink()


def check_disk(folder: Path, source: Source, options: Options, fps: float, size: tuple[int, int]) -> None:
    """Compare the free disk with an estimate of what will be written.

    Raises:
        DataError: there is too little.
    """
    pixels = source.width * source.height
    seconds = source.duration if source.duration is not None else 600.0
    per_second = 0.015 * pixels * source.rate + 50_000 + fps * size[0] * size[1] / 4
    per_second += {"png": 0.05 * pixels * fps, "video": 0.1 * pixels * source.rate, "none": 0.0}[options.masks]
    needed = round(seconds * per_second) + SPARE_BYTES
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DataError(
            f"{folder} has {free / 1e6:,.0f} MB free, and {source.path} needs about {needed / 1e6:,.0f} MB: make room, "
            "choose another folder with --out DIR, or write fewer masks (--masks none)."
        )


def write_result(path: Path, header: Mapping[str, Any], store: MaskStore) -> None:
    """Write the report: the header, and a line per mask, without holding all of them in memory."""
    with atomic_path(path) as part, part.open("w") as file:
        file.write(json.dumps(header, indent=2)[:-2] + ',\n  "masks": [')
        for index, record in enumerate(store.records()):
            file.write(("," if index else "") + "\n    " + json.dumps(record))
        file.write("\n  ]\n}\n")


def versions() -> dict[str, str]:
    """Versions of what takes part."""
    codec = av.library_versions["libavcodec"]
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "av": av.__version__,
        "libavcodec": ".".join(map(str, codec)),
    }
