"""Small pictures of every clip that a test scored, and a sheet of its best, typical and worst clips.

`{title}_clips.zip` beside the scores holds, for scripts/report.py, per clip a strip of frames (JPEG), of labels and of
predictions (PNG of class numbers), and `clips.json`, which lists them. A frame takes about 3 KB.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from scripts.engine.visualize import image_of
from utils.errors import DataError
from utils.files import atomic_path

SHOWN_FRAMES = 5
SIDE = 96
"""Longer side of a stored frame, pixels."""
INDEX = "clips.json"
RANKS = ("best", "typical", "worst")

Pixels = npt.NDArray[np.uint8]


class ClipPictures:
    """Writes the pictures of clips into a ZIP file, which appears when the block ends without an error.

    Args:
        path: the file.
        classes: names of the class numbers, background first.
    """

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        self.path = path
        self.classes = list(classes)
        self._clips: list[dict[str, Any]] = []

    def __enter__(self) -> "ClipPictures":
        """Begin the file under a temporary name."""
        self._pending = atomic_path(self.path, durable=False)
        self._zip = zipfile.ZipFile(self._pending.__enter__(), "w")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the list of clips and give the file its name, or remove it."""
        if kind is None:
            self._zip.writestr(INDEX, json.dumps({"classes": self.classes, "clips": self._clips}))
        self._zip.close()
        self._pending.__exit__(kind, error, trace)

    def add(self, item: Mapping[str, Any], predictions: Tensor) -> None:
        """Add a clip.

        Args:
            item: of the data set, see AudioVisualDataset.
            predictions: (T, H, W) class numbers.
        """
        shown = shown_seconds(item)
        number = len(self._clips)
        labelled = [bool(item["gt_temporal_mask_flag"][second]) for second in shown]
        self._clips.append(
            {"name": item["name"], "seconds": [second + 1 for second in shown], "labelled": labelled, "member": number}
        )
        size = _small(item["masks"].shape[-2:])
        frames = np.concatenate([_resized(image_of(item["frames"][second]), size) for second in shown], axis=1)
        self._write(number, "frames.jpg", frames, format="JPEG", quality=80)
        for name, masks in (("truth.png", item["masks"]), ("prediction.png", predictions)):
            classes = [_resized(masks[second].numpy().astype(np.uint8), size, smooth=False) for second in shown]
            self._write(number, name, np.concatenate(classes, axis=1), format="PNG")

    def _write(self, number: int, name: str, pixels: Pixels, **options: Any) -> None:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, **options)
        self._zip.writestr(f"{number}/{name}", buffer.getvalue())


@dataclass(frozen=True)
class Strip:
    """Stored pictures of a clip: `len(seconds)` frames side by side.

    Attributes:
        name: of the clip.
        seconds: shown, from 1.
        labelled: per second, whether it has a label.
        frames: (H, W * frames, 3).
        truth: (H, W * frames) class numbers.
        prediction: the same.
    """

    name: str
    seconds: list[int]
    labelled: list[bool]
    frames: Pixels
    truth: Pixels
    prediction: Pixels


class StoredClips:
    """Reads what ClipPictures wrote.

    Args:
        path: the ZIP file.

    Raises:
        DataError: it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
            index = json.loads(self._zip.read(INDEX))
            self.classes: list[str] = [str(name) for name in index["classes"]]
            self._clips = {str(clip["name"]): clip for clip in index["clips"]}
        except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} holds no pictures of clips ({error}): score the weights again.") from error

    @property
    def names(self) -> list[str]:
        """Of the clips, in the order of the split."""
        return list(self._clips)

    def read(self, name: str) -> Strip:
        """The pictures of a clip.

        Raises:
            DataError: the file is damaged.
        """
        clip = self._clips[name]
        try:
            frames, truth, prediction = (
                np.asarray(Image.open(io.BytesIO(self._zip.read(f"{clip['member']}/{part}"))))
                for part in ("frames.jpg", "truth.png", "prediction.png")
            )
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.path} is damaged at clip {name} ({error}): score the weights again.") from error
        return Strip(name, list(clip["seconds"]), list(clip["labelled"]), frames, truth, prediction)


class Predictions:
    """The predicted classes of clips, compressed in memory: those to be drawn are known only after the last one."""

    def __init__(self) -> None:
        self._packed: list[tuple[bytes, tuple[int, ...]]] = []

    def append(self, classes: Tensor) -> None:
        """Add a clip's (T, H, W) uint8."""
        pixels = classes.cpu().numpy().astype(np.uint8)
        self._packed.append((zlib.compress(pixels.tobytes(), 1), pixels.shape))

    def __getitem__(self, index: int) -> Tensor:
        """A clip's (T, H, W) uint8."""
        packed, shape = self._packed[index]
        return torch.frombuffer(bytearray(zlib.decompress(packed)), dtype=torch.uint8).view(shape)


def extremes(scores: Sequence[float], with_object: Sequence[bool], count: int = 2) -> list[tuple[str, int]]:
    """The best, typical (around the median) and worst clips.

    Args:
        scores: per clip; NaN leaves it out.
        with_object: per clip, whether its labels have an object. Clips without are right where nothing is painted, and
            are taken only where there are no others.
        count: of each rank, less where clips are few.

    Returns:
        (rank, number of the clip), no clip twice.
    """
    valid = [index for index, score in enumerate(scores) if score == score]
    order = sorted([i for i in valid if with_object[i]] or valid, key=lambda index: -scores[index])
    count = min(count, len(order) // len(RANKS) or 1)
    middle = (len(order) - count) // 2
    chosen = [order[:count], order[middle : middle + count], order[len(order) - count :]]
    found: dict[int, str] = {}
    for rank, clips in zip(RANKS, chosen, strict=True):
        for index in clips:
            found.setdefault(index, rank)
    return [(rank, index) for index, rank in found.items()]


def shown_seconds(item: Mapping[str, Any]) -> list[int]:
    """Up to SHOWN_FRAMES real frames of a clip, spread evenly."""
    real = torch.nonzero(item["vid_temporal_mask_flag"]).flatten().tolist()
    wanted = min(len(real), SHOWN_FRAMES)
    return [real[index * len(real) // wanted] for index in range(wanted)]


def _small(size: Sequence[int]) -> tuple[int, int]:
    height, width = size
    factor = min(1.0, SIDE / max(height, width))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _resized(pixels: Pixels, size: tuple[int, int], *, smooth: bool = True) -> Pixels:
    method = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(pixels).resize(size, method))
