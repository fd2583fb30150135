"""What test.py runs: predictors, one pass over a split, and its results as table, JSON, sheet of images and masks."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from dataloader import AudioVisualDataset, build_dataset
from model.checkpoint import read_record
from model.precision import AUTOCAST, round_weights
from scripts.engine.clip_pictures import ClipPictures, Predictions, extremes
from scripts.engine.clip_scores import ClipScores
from scripts.engine.loop import Batch, evaluate, predictor
from scripts.engine.plots import save_class_bars
from scripts.engine.provenance import describe_split, differences, origin
from scripts.engine.task_metrics import SCALARS, TaskMetrics
from scripts.engine.visualize import SheetRow, clip_rows, predicted_classes, save_masks, save_sheet
from utils.errors import DataError
from utils.files import atomic_path
from utils.runtime import warn

SHEET_CLIPS = 4
SHEET_ROWS_PER_CLIP = 3
EXTREME_ROWS_PER_CLIP = 2
CERTAIN = 20.0
"""Magnitude of an oracle's logits."""


class Predictor(Protocol):
    """What can be scored."""

    def logits(self, batch: Batch, first_clip: int) -> Tensor:
        """(N, K, H, W) float32 of a batch of clips; `first_clip` is the number of its first clip in the split."""
        ...


class ModelPredictor:
    """A model in a precision, on a device.

    Args:
        model: from `model.build_model`, with its weights; in a low precision they are rounded in place.
        precision: '32', 'bf16' or '16'.
        device: where it runs.
    """

    def __init__(self, model: nn.Module, precision: str, device: torch.device) -> None:
        self.model = model.to(device)
        self.device = device
        self.dtype = None if precision == "32" else AUTOCAST[precision]
        if self.dtype:
            round_weights(self.model, self.dtype)
        self._predict = predictor(self.model, device)

    def logits(self, batch: Batch, first_clip: int) -> Tensor:
        """See Predictor."""
        amp = torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()
        with amp:
            return self._predict(batch, first_clip).cpu()


class EverythingOracle:
    """The masks of all objects, sounding or not: an upper bound for sight alone.

    Args:
        cfg: the split's config; its data has the masks of all objects, as scripts/data/make_stamps.py writes them.
        where: its key in the config, for messages.

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
    """One pass over a split: scores, those of each clip, a sheet of images, and the predicted masks where asked for.

    Args:
        predictor: what is scored.
        dataset: the split.
        task: 's4', 'ms3' or 'avss'.
        folder: where `{title}_clips.csv` (see ClipScores), `{title}_clips.zip` (see ClipPictures) and the pictures go:
            `images/{title}.png`, `images/{title}_extremes.png`, and for avss `images/{title}_classes.png`.
        title: of the sheet, and the name of its file.
        items: read instead of `dataset`, clip for clip (another sound).
        masks_folder: root for predicted masks in AVSBench's form; None writes none.
        workers: processes that read.
        console: for the progress bar.

    Returns:
        The scalar scores, and for avss `per_class`: class name -> iou, f_score, frames.
    """
    metrics = TaskMetrics(task, dataset.num_classes)
    chosen = evenly(len(dataset), SHEET_CLIPS)
    rows: list[SheetRow] = []
    clips, predictions, with_object = ClipScores(dataset.num_classes), Predictions(), list[bool]()

    def collect(batch: Batch, logits: Tensor, first_clip: int) -> None:
        for clip, name in enumerate(batch["name"]):
            frames = slice(clip * dataset.num_frames, (clip + 1) * dataset.num_frames)
            clips.add(name, logits[frames], batch["masks"][clip], batch["gt_temporal_mask_flag"][clip])
            item = {key: value[clip] for key, value in batch.items()}
            predicted = predicted_classes(logits[frames]).cpu()
            predictions.append(predicted)
            with_object.append(bool(item["masks"].any()))
            pictures.add(item, predicted)
            if first_clip + clip in chosen:
                rows.extend(_rows(item, predicted, SHEET_ROWS_PER_CLIP))
            if masks_folder is not None:
                _save(masks_folder, dataset, first_clip + clip, logits[frames])

    with ClipPictures(folder / f"{title}_clips.zip", dataset.classes) as pictures:
        one_pass(predictor, dataset, metrics, collect, items=items, title=title, workers=workers, console=console)
    clips.write(folder / f"{title}_clips.csv")
    images = folder / "images"
    save_sheet(images / f"{title}.png", rows, classes=dataset.classes, title=title)
    scores = [miou for *_, miou in clips.rows]
    extreme: list[SheetRow] = []
    for rank, index in extremes(scores, with_object):
        item = (items if items is not None else dataset)[index]
        heading = f"{rank}: {scores[index]:.2f}\n{item['name']}"
        extreme += _rows({**item, "name": heading}, predictions[index], EXTREME_ROWS_PER_CLIP, with_object=True)
    if extreme:
        heading = f"{title}: best, typical and worst clips by mIoU"
        save_sheet(images / f"{title}_extremes.png", extreme, classes=dataset.classes, title=heading)
    found = results(metrics, dataset.classes)
    if any(values["frames"] for values in found.get("per_class", {}).values()):
        save_class_bars(found["per_class"], images / f"{title}_classes.png", title=f"{title}: scores per class")
    return found


def one_pass(
    predictor: Predictor,
    dataset: AudioVisualDataset,
    metrics: TaskMetrics,
    collect: Callable[[Batch, Tensor, int], None],
    *,
    items: Dataset[dict[str, Any]] | None = None,
    title: str = "",
    workers: int = 0,
    console: Console | None = None,
) -> dict[str, float]:
    """Predict a split once, in the order of its table.

    Args:
        predictor: what is scored.
        dataset: the split.
        metrics: of the task; reset first.
        collect: called with each batch, its logits (N, K, H, W) and the number of its first clip.
        items: read instead of `dataset`, clip for clip.
        title: of the progress bar.
        workers: processes that read.
        console: for the progress bar.

    Returns:
        The scalar metrics.
    """
    batches = BatchSampler(SequentialSampler(range(len(dataset))), dataset.batch_size, drop_last=False)
    loader: DataLoader[Batch] = DataLoader(
        items if items is not None else dataset, batch_sampler=batches, num_workers=workers
    )
    with Progress(console=console, disable=not (console and console.is_terminal)) as progress:
        bar = progress.add_task(title, total=len(loader))

        def on_batch(index: int, batch: Batch, logits: Tensor, first_clip: int) -> None:
            collect(batch, logits, first_clip)
            progress.advance(bar)

        return evaluate(predictor.logits, loader, metrics, on_batch=on_batch)


def results(metrics: TaskMetrics, classes: list[str]) -> dict[str, Any]:
    """Metrics as plain numbers, for avss with those of each class."""
    values = metrics.compute()
    found: dict[str, Any] = {name: float(values[name]) for name in SCALARS[metrics.task]}
    if metrics.task == "avss":
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


def origin_of_scores(dataset: AudioVisualDataset, split: str, checkpoint: Path | None) -> dict[str, Any]:
    """What the scores of a test come from: code, data and convention; warns where the weights' run had others.

    Args:
        dataset: what is scored.
        split: its name.
        checkpoint: the weights' file; without a record, as published, it is compared with nothing.
    """
    now = describe_split(dataset)
    record = None if checkpoint is None else read_record(checkpoint)
    for line in differences(record, now, split):
        warn(line)
    weights = {key: record.get(key) for key in ("commit", "seed", "epoch", "scores")} if record else None
    return {**origin(), "data": now, "weights": weights}


def write_results(path: Path, header: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """Write scores as JSON, atomically."""
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
    return [index * count // wanted for index in range(wanted)]


def _rows(item: Mapping[str, Any], predictions: Tensor, count: int, *, with_object: bool = False) -> list[SheetRow]:
    """Rows of a clip for a sheet, at most `count`, spread evenly; `with_object`: over those whose label has one."""
    keys = ("name", "frames", "log_mel", "masks", "gt_temporal_mask_flag", "vid_temporal_mask_flag")
    drawn = clip_rows(**{key: item[key] for key in keys}, predictions=predictions)
    if with_object:
        drawn = [row for row in drawn if row.truth is not None and row.truth.any()] or drawn
    return [drawn[row] for row in evenly(len(drawn), count)]


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
