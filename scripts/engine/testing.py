"""Scores of a model, or of an oracle, on one split of a data set, with what a person wants to see of it."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dataloader import AudioVisualDataset, build_dataset
from model.avs_model import among_zeros, places
from model.precision import AUTOCAST, round_weights
from scripts.engine.evaluation import SCALARS, Scores
from scripts.engine.visualize import SheetRow, clip_rows, predicted_classes, save_masks, save_sheet
from utils.errors import DataError
from utils.files import atomic_path

SHEET_CLIPS = 4
SHEET_ROWS_A_CLIP = 3
CERTAIN = 20.0
"""Logit of an oracle's pixel."""


class Predictor(Protocol):
    """What can be scored."""

    def logits(self, batch: Mapping[str, Any], first_clip: int) -> Tensor:
        """(N, K, H, W) float32 of a batch of clips, the first of which is number `first_clip` of the split."""
        ...


class ModelPredictor:
    """A model's answers.

    Args:
        model: from `model.build_model`, with its weights; in a low precision they are rounded for good.
        task: 's4', 'ms3' or 'avss'.
        precision: '32', 'bf16' or '16'.
        device: where it runs.
    """

    def __init__(self, model: nn.Module, task: str, precision: str, device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.task = task
        self.device = device
        self.dtype = None if precision == "32" else AUTOCAST[precision]
        if self.dtype:
            round_weights(self.model, self.dtype)

    @torch.inference_mode()
    def logits(self, batch: Mapping[str, Any], first_clip: int) -> Tensor:
        """See Predictor."""
        frames, log_mel, real = (
            batch[key].flatten(0, 1).to(self.device) for key in ("frames", "log_mel", "vid_temporal_mask_flag")
        )
        amp = torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()
        flag = real if self.task == "avss" else None
        answered = places(flag)
        with amp:
            output = self.model(log_mel, frames, flag, answered)
        return among_zeros(output.logits.float(), answered, len(frames)).cpu()


class EverythingOracle:
    """Paints every object exactly, sounding or not: what sight alone could reach at best.

    Args:
        cfg: the split's config; its data has the masks of all objects, as scripts/data/make_stamps.py writes them.
        where: its place in the config, for messages.

    Raises:
        DataError: the data has no such masks.
    """

    def __init__(self, cfg: Mapping[str, Any], where: str) -> None:
        self.dataset = build_dataset(cfg, where=where)
        if self.dataset.task == "avss":
            self.dataset.clips = [
                dataclasses.replace(clip, masks=tuple(_everything_of(frame) for frame in clip.frames))
                for clip in self.dataset.clips
            ]
        else:
            masks = str(self.dataset.roots()["masks"].parent / "all_objects")
            self.dataset = build_dataset(cfg, where=where, dir_mask=masks)
        first = self.dataset.clips[0].masks[0]
        if not first.is_file():
            raise DataError(
                f"--oracle needs the masks of all objects, which stamps data alone has; {first} is missing."
            )

    def logits(self, batch: Mapping[str, Any], first_clip: int) -> Tensor:
        """See Predictor."""
        return torch.cat([self._clip(first_clip + clip) for clip in range(len(batch["name"]))])

    def _clip(self, index: int) -> Tensor:
        classes = self.dataset[index]["masks"].long()
        if self.dataset.num_classes == 1:
            return torch.where(classes > 0, CERTAIN, -CERTAIN)[:, None]
        return CERTAIN * F.one_hot(classes, self.dataset.num_classes).movedim(-1, 1).float()


def score(
    predictor: Predictor,
    dataset: AudioVisualDataset,
    *,
    task: str,
    folder: Path,
    title: str,
    items: Dataset[dict[str, Any]] | None = None,
    masks_folder: Path | None = None,
    workers: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run over a split: scores, a sheet of pictures, and the predicted masks where asked for.

    Args:
        predictor: what is scored.
        dataset: the split.
        task: 's4', 'ms3' or 'avss'.
        folder: where the sheet goes, as `pictures/{title}.png`.
        title: of the sheet, and the name of its file.
        items: what is read instead of `dataset`, clip for clip (another sound).
        masks_folder: root for predicted masks in AVSBench's form; None = none.
        workers: processes that read.
        console: for the progress bar.

    Returns:
        The scalar scores, and for avss `per_class`: class name -> iou, f_score, frames.
    """
    scores = Scores(task, dataset.num_classes)
    loader: DataLoader[dict[str, Any]] = DataLoader(
        items if items is not None else dataset, batch_size=dataset.batch_size, num_workers=workers
    )
    chosen = evenly(len(dataset), SHEET_CLIPS)
    rows: list[SheetRow] = []
    first = 0
    for batch in track(loader, description=title, console=console, disable=not (console and console.is_terminal)):
        logits = predictor.logits(batch, first)
        scores.update(logits, batch, first)
        for clip, name in enumerate(batch["name"]):
            frames = slice(clip * dataset.frames_per_clip, (clip + 1) * dataset.frames_per_clip)
            if first + clip in chosen:
                drawn = clip_rows(
                    name,
                    batch["frames"][clip],
                    batch["log_mel"][clip],
                    batch["masks"][clip],
                    logits[frames],
                    batch["gt_temporal_mask_flag"][clip],
                    batch["vid_temporal_mask_flag"][clip],
                )
                rows += [drawn[index] for index in evenly(len(drawn), SHEET_ROWS_A_CLIP)]
            if masks_folder is not None:
                _save(masks_folder, dataset, first + clip, logits[frames])
        first += len(batch["name"])
    save_sheet(folder / "pictures" / f"{title}.png", rows, classes=dataset.classes, title=title)
    return results(scores, dataset.classes)


def results(scores: Scores, classes: list[str]) -> dict[str, Any]:
    """Scores as plain numbers."""
    values = scores.compute()
    found: dict[str, Any] = {name: float(values[name]) for name in SCALARS[scores.task]}
    if scores.task == "avss":
        columns = zip(
            classes,
            values["iou_per_class"].tolist(),
            values["f_per_class"].tolist(),
            values["frames_per_class"].tolist(),
            strict=True,
        )
        found["per_class"] = {
            name: {"iou": iou, "f_score": f, "frames": int(frames)} for name, iou, f, frames in columns
        }
    return found


def write_results(path: Path, header: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """Write scores as JSON, whole or not at all."""
    with atomic_path(path) as part:
        part.write_text(json.dumps({**header, **scores}, indent=2) + "\n")


def results_table(scores: Mapping[str, Any], title: str) -> Table:
    """Scores for the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in scores.items():
        if name != "per_class":
            table.add_row(name, f"{value:.4f}")
    for name, values in scores.get("per_class", {}).items():
        if values["frames"]:
            table.add_row(f"{name} (iou / F)", f"{values['iou']:.4f} / {values['f_score']:.4f}")
    return table


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers below `count`, spread evenly."""
    wanted = min(count, wanted)
    return [place * count // wanted for place in range(wanted)]


def _everything_of(frame: Path) -> Path:
    return frame.parents[1] / "all_objects_rgb" / f"{frame.stem}.png"


def _save(folder: Path, dataset: AudioVisualDataset, index: int, logits: Tensor) -> None:
    clip = dataset.clips[index]
    predictions = predicted_classes(logits)[: len(clip.frames)]
    if getattr(dataset, "resize_pred_mask", False):
        width, height = dataset.save_pred_mask_img_size  # type: ignore[attr-defined]
        predictions = F.interpolate(predictions[:, None], size=(height, width), mode="nearest")[:, 0]
    category = clip.row["category"] if dataset.task == "s4" else ""
    save_masks(folder, clip.name, predictions, category=category, semantic=dataset.task == "avss")
