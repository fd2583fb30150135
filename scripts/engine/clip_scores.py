"""The mIoU of each clip of a split: what a paired comparison of two models resamples."""

import csv
from pathlib import Path

import pandas as pd
from torch import Tensor

from utils.errors import DataError
from utils.files import atomic_path
from utils.metrics import MaskIoU, SemanticScores

COLUMNS = ("clip", "frames", "miou")


class ClipScores:
    """Collects the mIoU of clips.

    s4, ms3: the mean over the clip's labelled frames, as AVSBench counts a frame; where all clips have the same number
    of labelled frames, the mean over clips is the split's mIoU. avss: the mean over the classes in the clip's
    prediction or label, each class averaged over the frames that have it; classes of other clips do not count, so that
    the mean over clips is not the split's mIoU.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        self._metric = MaskIoU() if num_classes == 1 else SemanticScores(num_classes)
        self.rows: list[tuple[str, int, float]] = []

    def add(self, name: str, logits: Tensor, masks: Tensor, labelled: Tensor) -> None:
        """Add a clip.

        Args:
            name: of the clip.
            logits: (T, K, H, W), any float dtype.
            masks: (T, H, W) class numbers.
            labelled: (T,), 0 = the frame has no label, and does not count.
        """
        frames = int((labelled != 0).sum())
        self._metric.update(logits, masks, labelled)
        miou: Tensor | dict[str, Tensor] = self._metric.compute()
        self._metric.reset()
        if isinstance(miou, dict):
            present = miou["frames_per_class"] > 0
            miou = miou["iou_per_class"][present].mean()  # NaN where no frame is labelled
        self.rows.append((name, frames, float(miou)))

    def write(self, path: Path) -> None:
        """Write a CSV with the columns clip, frames (labelled ones), miou (0 to 1), in the order of the split."""
        with atomic_path(path) as part, part.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows((name, frames, repr(miou)) for name, frames, miou in self.rows)


def read_clip_scores(path: Path) -> pd.Series:
    """Name of the clip -> mIoU, 0 to 1, in the order of the split; clips without labelled frames are left out.

    Raises:
        DataError: the file is missing or is not such a table.
    """
    try:
        table = pd.read_csv(path, dtype={"clip": str}, keep_default_na=False, na_values={"miou": ["nan"]})
        return table.set_index("clip")["miou"].astype(float).dropna()
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} is not a table of clips ({error}): score the weights again with test.sh, which writes it."
        ) from error
