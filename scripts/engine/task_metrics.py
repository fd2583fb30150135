"""The AVSBench metrics of each task, the same in validation and in the test."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from utils.errors import ConfigError
from utils.metrics import DatasetScores, FScore, MaskIoU, PaintedShare, SemanticScores

CLIPS_IN_PUBLISHED_BATCH = 2

BEST_FILES: dict[str, dict[str, Callable[[Mapping[str, float]], float]]] = {
    "s4": {"S4_best.pth": lambda scores: scores["miou"]},
    "ms3": {"MS3_best.pth": lambda scores: scores["miou"]},
    "avss": {
        "AVSS_miou_best.pth": lambda scores: scores["miou"],
        "AVSS_miou_f_best.pth": lambda scores: scores["miou"] + scores["f_score"],
    },
}
"""Weights files that training keeps for each task, and the score that selects their epoch."""

SCALARS: dict[str, tuple[str, ...]] = {
    "s4": ("miou", "f_score", "f_score_per_batch"),
    "ms3": ("miou", "f_score", "f_score_per_batch"),
    "avss": (
        "miou",
        "f_score",
        "miou_foreground",
        "f_score_foreground",
        "miou_published_no_background",
        "f_score_published_no_background",
    ),
}


class TaskMetrics(nn.Module):
    """The AVSBench metrics of a task.

    Args:
        task: 's4', 'ms3' or 'avss'.
        num_classes: K.

    Raises:
        ConfigError: the task does not have this number of classes.
    """

    semantic: SemanticScores
    mask_iou: MaskIoU
    f_score: FScore

    def __init__(self, task: str, num_classes: int) -> None:
        super().__init__()
        if (task == "avss") != (num_classes > 1):
            raise ConfigError(
                f"task {task} and a model of {num_classes} classes do not fit: see model.head.num_classes."
            )
        self.task = task
        if task == "avss":
            self.semantic = SemanticScores(num_classes)
        else:
            self.mask_iou, self.f_score = MaskIoU(), FScore()

    def update(self, logits: Tensor, batch: dict[str, Any], first_clip: int) -> None:
        """Add a batch.

        Args:
            logits: (N, K, H, W).
            batch: of the data module.
            first_clip: number of the batch's first clip in the split; AVSBench's F is a mean over batches of 2 clips.
        """
        masks = batch["masks"].flatten(0, 1)
        labelled = batch["gt_temporal_mask_flag"].flatten()
        if self.task == "avss":
            # As published, padded frames count as background predicted rightly; real frames without label do not count.
            padding = batch["vid_temporal_mask_flag"].flatten() == 0
            self.semantic.update(logits, masks, (labelled != 0) | padding)
            return
        clips, frames = batch["masks"].shape[:2]
        published_batch = (first_clip + torch.arange(clips)).repeat_interleave(frames) // CLIPS_IN_PUBLISHED_BATCH
        self.mask_iou.update(logits, masks, labelled)
        self.f_score.update(logits, masks, labelled, batch_index=published_batch)

    def reset(self) -> None:
        """Forget all batches."""
        for metric in self.children():
            assert isinstance(metric, Metric)
            metric.reset()

    def compute(self) -> dict[str, Tensor]:
        """Metrics over all processes: the scalars of `SCALARS`, and for avss those of each class."""
        if self.task == "avss":
            return dict(self.semantic.compute())
        return {"miou": self.mask_iou.compute(), **self.f_score.compute()}

    def scalars(self) -> dict[str, float]:
        """The scalar metrics as numbers."""
        scores = self.compute()
        return {name: float(scores[name]) for name in SCALARS[self.task]}


DATASET_SCALARS = ("miou_dataset", "f_dataset", "jf_dataset")
"""Scores of the CAVP family's convention, see `utils.metrics.DatasetScores`."""


class RobustMetrics(TaskMetrics):
    """The metrics of a task, those of the CAVP family's convention, and the share of painted pixels (`fpr`).

    For s4 and ms3 also `miou_with_object`, the mean IoU of the frames in which something sounds. Frames without object
    score the share of empty pixels in `miou`, with any sound: where nothing is painted on a wrong sound, `miou` is
    their share of all frames, and bounds the balanced score.

    Args:
        task: 's4', 'ms3' or 'avss'.
        num_classes: K.
    """

    def __init__(self, task: str, num_classes: int) -> None:
        super().__init__(task, num_classes)
        self.dataset_scores, self.painted = DatasetScores(num_classes), PaintedShare()
        self.with_object = MaskIoU() if num_classes == 1 else None

    def update(self, logits: Tensor, batch: dict[str, Any], first_clip: int) -> None:
        """See TaskMetrics; pixels are summed over labelled frames, and the painted share is of all real frames.

        Clips flagged False by `batch["counted"]`, (B,) bool, are left out.
        """
        counted = batch.get("counted")
        if counted is not None:
            frames = len(logits) // len(counted)
            for clip in torch.nonzero(counted).flatten().tolist():
                alone = {key: value[clip : clip + 1] for key, value in batch.items() if key != "counted"}
                self.update(logits[clip * frames : (clip + 1) * frames], alone, first_clip + clip)
            return
        super().update(logits, batch, first_clip)
        masks = batch["masks"].flatten(0, 1)
        labelled = batch["gt_temporal_mask_flag"].flatten()
        self.dataset_scores.update(logits, masks, labelled)
        if self.with_object is not None:
            self.with_object.update(logits, masks, labelled * masks.flatten(1).any(1))
        self.painted.update(logits, masks, batch["vid_temporal_mask_flag"].flatten())

    def compute(self) -> dict[str, Tensor]:
        """See TaskMetrics; with `miou_dataset`, `f_dataset`, `jf_dataset`, `fpr`, and `miou_with_object`."""
        found = {**super().compute(), **self.dataset_scores.compute(), "fpr": self.painted.compute()}
        return found if self.with_object is None else {**found, "miou_with_object": self.with_object.compute()}

    def scalars(self) -> dict[str, float]:
        """The scalar metrics as numbers."""
        scores = self.compute()
        names = [*SCALARS[self.task], *DATASET_SCALARS, "fpr"]
        return {name: float(scores[name]) for name in [*names, *(["miou_with_object"] if self.with_object else [])]}
