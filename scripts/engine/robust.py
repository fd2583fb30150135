"""Robustness to sounds that none of the visible objects makes (AVSBench-Robust, arXiv 2502.00358)."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dataloader import AudioVisualDataset
from dataloader.audio_ablation import ReplacedSound
from scripts.engine.loop import Batch
from scripts.engine.task_metrics import RobustMetrics
from scripts.engine.testing import SHEET_CLIPS, Predictor, evenly, one_pass
from scripts.engine.visualize import SoundsRow, predicted_classes, save_sounds_sheet
from utils.metrics import balanced_score

NEGATIVES = ("silence", "noise", "off_screen")
BALANCED = {
    "s4": ("miou", "f_score", "f_score_per_batch", "miou_with_object"),
    "ms3": ("miou", "f_score", "f_score_per_batch", "miou_with_object"),
    "avss": ("miou", "f_score", "miou_foreground", "f_score_foreground"),
}
"""Scores of which G, the harmonic mean, is reported."""
FRAMES_PER_CLIP = 2
_HEADINGS = {
    "miou": "mIoU",
    "f_score": "F",
    "f_score_per_batch": "F per batch",
    "miou_foreground": "mIoU fore",
    "f_score_foreground": "F fore",
    "miou_dataset": "J of set",
    "f_dataset": "F of set",
    "fpr": "FPR",
}
_RULES = {"group": "of another group", "label": "of another label", "any": "of any other clip", "none": "left out"}
_TITLES = {"own": "own sound", "silence": "silence", "noise": "white noise", "off_screen": "off-screen"}


def score_robust(
    predictor: Predictor,
    dataset: AudioVisualDataset,
    *,
    task: str,
    folder: Path,
    title: str,
    seed: int,
    workers: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score a split with the clips' own sound, silence, white noise and off-screen sounds, and draw a sheet.

    All four are scored against the clips' own masks, as in AVSBench-Robust, so that the scores of the last three should
    be low. They are not 0 where nothing is painted: mIoU counts frames without object as rightly empty, and F is the
    best of 255 thresholds, of which the first, 0, predicts all pixels. Clips in which no other clip's sound is
    off-screen are left out of `off_screen`; where that is all of them, there is no such condition.

    Args:
        predictor: what is scored.
        dataset: the split.
        task: 's4', 'ms3' or 'avss'.
        folder: where the sheet goes, as `images/{title}.png`.
        title: of the sheet, and the name of its file.
        seed: of noise and off-screen sounds.
        workers: processes that read.
        console: for the progress bars.

    Returns:
        `conditions`: name -> scores and `fpr`. `balanced`: name of a negative condition, or 'mean' for the mean score
        over all of them -> name of the score -> G, see `utils.metrics.balanced_score`. `off_screen`: the source of the
        labels, the number of clips by rule of choice, and `sounds`: clip -> clip whose sound it gets, None
        where it is left out.

    Raises:
        DataError: the split has a single clip, or files of it cannot be read.
    """
    sounds = {name: ReplacedSound(dataset, name, seed) for name in NEGATIVES}
    off_screen = sounds["off_screen"]
    if not any(other is not None for other in off_screen.other):
        del sounds["off_screen"]
    donor_of = {
        index: None if other is None else dataset.clips[other].name for index, other in enumerate(off_screen.other)
    }
    sheet = _Sheet(evenly(len(dataset), SHEET_CLIPS), dataset.num_frames, donor_of)
    metrics = RobustMetrics(task, dataset.num_classes)
    conditions = {}
    for name in ("own", *sounds):
        conditions[name] = one_pass(
            predictor,
            dataset,
            metrics,
            sheet.collector(name),
            items=sounds.get(name),
            title=_TITLES[name],
            workers=workers,
            console=console,
        )
    save_sounds_sheet(folder / "images" / f"{title}.png", sheet.rows(), classes=dataset.classes, title=title)
    return {
        "conditions": conditions,
        "balanced": balanced_scores(conditions, BALANCED[task]),
        "off_screen": {
            "labels": off_screen.labels,
            "rules": off_screen.rules,
            "sounds": {clip.name: donor_of[index] for index, clip in enumerate(dataset.clips)},
        },
    }


def balanced_scores(
    conditions: Mapping[str, Mapping[str, float]], names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """G of some scores, for each negative condition and for the mean over them.

    Args:
        conditions: `own` and the negative ones, each with its scores.
        names: of the scores.
    """
    own = conditions["own"]
    negative = {name: {score: values[score] for score in names} for name, values in conditions.items() if name != "own"}
    negative["mean"] = {score: fmean(values[score] for values in negative.values()) for score in names}
    return {
        name: {score: balanced_score(own[score], values[score]) for score in names} for name, values in negative.items()
    }


def robust_table(scores: Mapping[str, Any], title: str) -> Table:
    """One row per sound, in percent, for the terminal; G stands in the rows of the other sounds and of their mean."""
    conditions, balanced = scores["conditions"], scores["balanced"]
    table = Table(
        title=title,
        title_justify="left",
        caption=_caption(scores),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,  # 80 columns hold all scores
    )
    table.add_column("%", no_wrap=True)
    shown = [name for name in conditions["own"] if name in _HEADINGS]
    for name in shown:
        table.add_column(_HEADINGS[name], justify="right")
    tabled = [name for name in balanced["mean"] if name in _HEADINGS]
    for name in tabled:
        table.add_column(f"G {_HEADINGS[name]}", justify="right")
    negatives = [condition for condition in conditions if condition != "own"]
    for condition in conditions:
        values = [f"{100 * conditions[condition][name]:.1f}" for name in shown]
        values += [f"{100 * balanced[condition][name]:.1f}" for name in tabled if condition in balanced]
        table.add_row(_TITLES[condition], *values)
    mean = [fmean(conditions[condition][name] for condition in negatives) for name in shown]
    values = [f"{100 * value:.1f}" for value in (*mean, *(balanced["mean"][name] for name in tabled))]
    table.add_row(f"mean of {len(negatives)}", *values)
    return table


class _Sheet:
    """Frames of some clips and their predictions, gathered in several passes over a split."""

    def __init__(self, clips: list[int], num_frames: int, donor_of: Mapping[int, str | None]) -> None:
        self.clips, self.num_frames, self.donor_of = clips, num_frames, donor_of
        self._frames: dict[tuple[int, int], tuple[str, Tensor, Tensor | None]] = {}
        self._predictions: dict[tuple[int, int], dict[str, Tensor]] = {}

    def collector(self, condition: str) -> Any:
        def collect(batch: Batch, logits: Tensor, first_clip: int) -> None:
            for clip, name in enumerate(batch["name"]):
                number = first_clip + clip
                if number not in self.clips:
                    continue
                classes = predicted_classes(logits[clip * self.num_frames : (clip + 1) * self.num_frames]).cpu()
                masks, labelled = batch["masks"][clip], batch["gt_temporal_mask_flag"][clip]
                for second in shown_frames(masks, batch["vid_temporal_mask_flag"][clip]):
                    key = (number, second)
                    truth = masks[second] if labelled[second] else None
                    self._frames[key] = (f"{name}\nsecond {second + 1}", batch["frames"][clip, second], truth)
                    self._predictions.setdefault(key, {})[_TITLES[condition]] = classes[second]

        return collect

    def rows(self) -> list[SoundsRow]:
        return [
            SoundsRow(
                *self._frames[key],
                self._predictions[key],
                {_TITLES["off_screen"]: self.donor_of[key[0]] or "left out: no sound is off-screen"},
            )
            for key in sorted(self._frames)
        ]


def shown_frames(masks: Tensor, real: Tensor) -> list[int]:
    """Up to FRAMES_PER_CLIP frames of a clip for a sheet: with objects where there are, spread evenly.

    Args:
        masks: (T, H, W).
        real: (T,), 0 = padding.
    """
    present = torch.nonzero(real).flatten().tolist()
    with_object = [second for second in present if bool(masks[second].any())]
    chosen = with_object or present
    return [chosen[index] for index in evenly(len(chosen), FRAMES_PER_CLIP)]


def _caption(scores: Mapping[str, Any]) -> str:
    rules = ", ".join(f"{count} {_RULES[rule]}" for rule, count in sorted(scores["off_screen"]["rules"].items()))
    return (
        "mIoU, F: AVSBench's, over frames. J, F of set: CAVP's, pixels summed over\n"
        "the data set. FPR: pixels painted. G: harmonic mean of the score with the\n"
        "clips' own sound and 100 minus that with the other sound.\n"
        f"Off-screen sounds: {rules}; labels: {scores['off_screen']['labels']}" + _with_object(scores)
    )


def _with_object(scores: Mapping[str, Any]) -> str:
    """mIoU and G of the frames in which something sounds, for binary tasks."""
    name = "miou_with_object"
    if name not in scores["balanced"]["mean"]:
        return ""
    own, balanced = scores["conditions"]["own"][name], scores["balanced"]["mean"][name]
    return f"\nFrames with an object alone: mIoU {100 * own:.1f}, G of the mean {100 * balanced:.1f}"
