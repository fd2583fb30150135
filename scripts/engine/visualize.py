"""Images of a run: sheets of frames with masks and log-mel, masks as AVSBench stores them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from dataloader.images import IMAGENET_MEAN, IMAGENET_STD
from dataloader.palette import encode, palette
from scripts.engine.plots import save_figure
from utils.errors import DataError

OBJECT_COLOUR = (255, 140, 0)  # orange: stands out from skin, grass, sky and wood, for colour-blind readers too
COLUMNS = ("frame", "truth", "prediction", "log-mel of its second")

Classes = npt.NDArray[np.uint8]  # (..., H, W) class numbers


def predicted_classes(logits: Tensor) -> Tensor:
    """Class of every pixel: logits (N, K, H, W) -> (N, H, W) uint8; for K = 1, 1 where the probability is above 0.5."""
    if logits.shape[1] == 1:
        return (logits.squeeze(1).float().sigmoid() > 0.5).to(torch.uint8)
    return logits.max(1).indices.to(torch.uint8)


@dataclass(frozen=True)
class SheetRow:
    """One frame of a sheet.

    Attributes:
        title: beside the row.
        frame: (3, H, W) float32, normalised by ImageNet's mean and deviation.
        log_mel: (1, 96, 64) float32, 96 steps of 10 ms by 64 mel bands.
        truth: (H, W) class numbers, or None where the frame has no label.
        prediction: (H, W) class numbers.
    """

    title: str
    frame: Tensor
    log_mel: Tensor
    truth: Tensor | None
    prediction: Tensor


def clip_rows(
    name: str,
    frames: Tensor,
    log_mel: Tensor,
    masks: Tensor,
    predictions: Tensor,
    gt_temporal_mask_flag: Tensor,
    vid_temporal_mask_flag: Tensor,
) -> list[SheetRow]:
    """Rows of one clip: its real frames, in order.

    Args:
        name: the clip's name.
        frames: (T, 3, H, W).
        log_mel: (T, 1, 96, 64).
        masks: (T, H, W).
        predictions: (T, H, W) class numbers.
        gt_temporal_mask_flag: (T,), 0 = the frame has no label.
        vid_temporal_mask_flag: (T,), 0 = padding, left out.
    """
    return [
        SheetRow(
            title=f"{name}\nsecond {second + 1}",
            frame=frames[second].cpu(),
            log_mel=log_mel[second].cpu(),
            truth=masks[second].cpu() if gt_temporal_mask_flag[second] else None,
            prediction=predictions[second].cpu(),
        )
        for second in range(len(frames))
        if vid_temporal_mask_flag[second]
    ]


def save_sheet(path: str | Path, rows: Sequence[SheetRow], *, classes: Sequence[str], title: str = "") -> None:
    """Draw one row per frame: the frame, truth and prediction overlaid, and the log-mel of its second.

    Args:
        path: PNG to write; its folder is made.
        rows: at least one.
        classes: names of the class numbers, background first; two names mean object or not.
        title: above everything.
    """
    if not rows:
        raise ValueError(f"{path}: a sheet needs at least one row")
    semantic = len(classes) > 2
    masks = [mask for row in rows for mask in (row.truth, row.prediction) if mask is not None]
    head, foot = 0.75, _legend_height(masks) if semantic else 0.1
    height = 1.9 * len(rows) + head + foot
    figure = Figure(figsize=(8.0, height), dpi=120)
    axes = figure.subplots(len(rows), 4, squeeze=False, gridspec_kw={"width_ratios": (1, 1, 1, 0.97)})
    figure.subplots_adjust(
        left=0.085, right=0.985, top=1 - head / height, bottom=(foot + 0.25) / height, wspace=0.05, hspace=0.12
    )
    low, high = _range([row.log_mel for row in rows])
    for cells, row in zip(axes, rows, strict=True):
        image = _show_frame_and_truth(cells, row, semantic)
        _show(cells[2], overlaid(image, row.prediction, semantic))
        if row.truth is not None:
            _note(cells[2], _agreement(row.truth, row.prediction, semantic))
        mel = cells[3]
        mel.imshow(row.log_mel[0].T, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high)
        mel.set_yticks([])
        mel.set_xticks([])
    for cell, column in zip(axes[0], COLUMNS, strict=True):
        cell.set_title(column, fontsize=10)
    axes[-1][3].set_xlabel("0 to 0.96 s, low to high", fontsize=7)
    _finish(figure, path, title, height, masks if semantic else [], classes)


@dataclass(frozen=True)
class SoundsRow:
    """One frame of a sheet that compares predictions with several sounds.

    Attributes:
        title: beside the row.
        frame: (3, H, W) float32, normalised by ImageNet's mean and deviation.
        truth: (H, W) class numbers for the clip's own sound, or None where the frame has no label.
        predictions: name of the sound -> (H, W) class numbers; the clip's own sound first.
        notes: name of the sound -> a word below its prediction, such as the clip that the sound is of.
    """

    title: str
    frame: Tensor
    truth: Tensor | None
    predictions: Mapping[str, Tensor]
    notes: Mapping[str, str] = field(default_factory=dict)


def save_sounds_sheet(path: str | Path, rows: Sequence[SoundsRow], *, classes: Sequence[str], title: str = "") -> None:
    """Draw one row per frame: the frame, the truth, and the prediction with each sound.

    Under the clip's own sound stands its agreement with the truth, under the others the share of pixels painted, which
    should be none.

    Args:
        path: PNG to write; its folder is made.
        rows: at least one, all with the same sounds.
        classes: names of the class numbers, background first; two names mean object or not.
        title: above everything.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError(f"{path}: a sheet needs at least one row")
    semantic = len(classes) > 2
    sounds = list(rows[0].predictions)
    masks = [mask for row in rows for mask in (row.truth, *row.predictions.values()) if mask is not None]
    head, foot = 0.75, _legend_height(masks) if semantic else 0.1
    height, width = 1.8 * len(rows) + head + foot, 1.75 * (len(sounds) + 2) + 0.8
    figure = Figure(figsize=(width, height), dpi=110)
    axes = figure.subplots(len(rows), len(sounds) + 2, squeeze=False)
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.05 / width, top=1 - head / height, bottom=foot / height, wspace=0.04, hspace=0.06
    )
    for cells, row in zip(axes, rows, strict=True):
        image = _show_frame_and_truth(cells, row, semantic)
        for number, (cell, sound) in enumerate(zip(cells[2:], sounds, strict=True)):
            prediction = row.predictions[sound]
            _show(cell, overlaid(image, prediction, semantic))
            if number == 0 and row.truth is not None:
                _note(cell, _agreement(row.truth, prediction, semantic))
            elif number > 0:
                _note(cell, f"painted: {100 * float((prediction > 0).float().mean()):.1f} %")
            if sound in row.notes:
                _note(cell, _wrapped(row.notes[sound], 26), below=True)
    for cell, column in zip(axes[0], ("frame", "truth", *sounds), strict=True):
        cell.set_title(column, fontsize=10)
    _finish(figure, path, title, height, masks if semantic else [], classes)


def save_masks(
    folder: str | Path, name: str, predictions: Tensor, *, category: str = "", semantic: bool = False
) -> list[Path]:
    """Write a clip's predicted masks in the form of AVSBench's evaluation.

    The files are `{folder}/{category}/{name}/{name}_{i}.png`, i from 0 (AVSBench's labels count from 1): one channel,
    0 or 255, for object masks; RGB in the 71 colours of AVSS for semantic ones.

    Args:
        folder: root; made where missing.
        name: the clip's name.
        predictions: (T, H, W) class numbers, padded frames left out.
        category: the clip's class (s4); empty elsewhere.
        semantic: class numbers mean classes, not object or not.

    Returns:
        The files written.

    Raises:
        DataError: a name or category that is not a plain file name.
    """
    for part in (name, category):
        if part in (".", "..") or any(character in part for character in "/\\\0"):
            raise DataError(f"masks cannot be saved under the name {part!r}, which is not a plain file name.")
    target = Path(folder) / category / name
    target.mkdir(parents=True, exist_ok=True)
    files = []
    for i, mask in enumerate(predictions.cpu().numpy().astype(np.uint8)):
        file = target / f"{name}_{i}.png"
        pixels = encode(mask) if semantic else (mask > 0).astype(np.uint8) * np.uint8(255)
        Image.fromarray(pixels).save(file)
        files.append(file)
    return files


def _show_frame_and_truth(cells: Sequence[Axes], row: "SheetRow | SoundsRow", semantic: bool) -> npt.NDArray[np.uint8]:
    """Fill the first two cells of a sheet's row; returns the frame as an image."""
    image = image_of(row.frame)
    _show(cells[0], image)
    cells[0].set_ylabel(_wrapped(row.title), fontsize=7)
    if row.truth is None:
        _show(cells[1], image // 3)
        _note(cells[1], "no label")
    else:
        _show(cells[1], overlaid(image, row.truth, semantic))
    return image


def _finish(
    figure: Figure, path: str | Path, title: str, height: float, masks: Sequence[Tensor], classes: Sequence[str]
) -> None:
    """Title, legend of the classes in `masks`, and file of a sheet; `height` in inches."""
    if title:
        figure.suptitle(title, fontsize=11, y=1 - 0.2 / height)
    if masks:
        _class_legend(figure, masks, classes)
    save_figure(figure, path)


def image_of(frame: Tensor) -> npt.NDArray[np.uint8]:
    """A normalised frame (3, H, W) as an image (H, W, 3) uint8."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = ((frame.float() * std + mean) * 255).round().clamp(0, 255)
    return pixels.permute(1, 2, 0).to(torch.uint8).numpy()


def overlaid(image: npt.NDArray[np.uint8], mask: Tensor, semantic: bool) -> npt.NDArray[np.uint8]:
    """The darkened image under the colours of the mask."""
    classes = mask.numpy().astype(np.uint8)
    colours = encode(classes) if semantic else np.where(classes[..., None] > 0, OBJECT_COLOUR, 0).astype(np.uint8)
    with_object = (classes > 0)[..., None]
    return np.where(with_object, 0.35 * image + 0.65 * colours, 0.55 * image).astype(np.uint8)


def _agreement(truth: Tensor, prediction: Tensor, semantic: bool) -> str:
    """The score of one frame: IoU of the object, or the mean IoU of the classes in truth or prediction."""
    found, wanted = prediction.long(), truth.long()
    if not semantic:
        found, wanted = (found > 0).long(), (wanted > 0).long()
    present = sorted({*found.unique().tolist(), *wanted.unique().tolist()} - {0})
    if not present:
        return "silent, rightly empty"
    iou = [
        float(((found == number) & (wanted == number)).sum() / ((found == number) | (wanted == number)).sum())
        for number in present
    ]
    return f"IoU {sum(iou) / len(iou):.2f}"


def _range(log_mels: Sequence[Tensor]) -> tuple[float, float]:
    values = torch.stack(list(log_mels)).float()
    low, high = float(values.min()), float(values.max())
    return low, high if high > low else low + 1


def _classes_of(masks: Sequence[Tensor]) -> list[int]:
    return sorted({number for mask in masks for number in mask.unique().tolist()})


def _class_name(classes: Sequence[str], number: int) -> str:
    return classes[number] if number < len(classes) else f"class {number}"


def _rgb(number: int) -> tuple[float, float, float]:
    red, green, blue = (float(value) / 255 for value in palette()[number])
    return red, green, blue


def _legend_height(masks: Sequence[Tensor]) -> float:
    return 0.15 + 0.17 * math.ceil(len(_classes_of(masks)) / 5)  # inches


def _class_legend(figure: Figure, masks: Sequence[Tensor], classes: Sequence[str]) -> None:
    present = [number for number in _classes_of(masks) if number]
    handles = [Patch(color=_rgb(number), label=_class_name(classes, number)) for number in present]
    if handles:
        figure.legend(handles=handles, loc="lower center", ncols=5, fontsize=7, frameon=False)


def _wrapped(title: str, width: int = 22) -> str:
    """The title with its long lines (clip names) cut in pieces that fit beside a row."""
    return "\n".join(line[at : at + width] for line in title.split("\n") for at in range(0, max(len(line), 1), width))


def _show(axes: Axes, image: npt.NDArray[np.uint8]) -> None:
    axes.imshow(image)
    axes.set_xticks([])
    axes.set_yticks([])


def _note(axes: Axes, text: str, *, below: bool = False) -> None:
    axes.text(
        0.03,
        0.04 if below else 0.96,
        text,
        transform=axes.transAxes,
        va="bottom" if below else "top",
        fontsize=7,
        color="white",
        bbox={"facecolor": "black", "alpha": 0.6, "pad": 1.5, "edgecolor": "none"},
    )
