"""Pictures of the page, as data URLs: curves and bars (SVG), strips of clips (JPEG)."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from scripts.engine.clip_pictures import Pixels, Strip
from scripts.engine.plots import COLOURS, GRADIENT_NORM, MARKERS, epoch_means, is_loss, is_score, show_names_as_they_are
from scripts.engine.visualize import overlaid
from scripts.reporting.runs import RunFolder

PANELS_PER_ROW = 3
_AXES = {"lr": "learning rate", GRADIENT_NORM: "gradient norm before clipping"}


def curves(runs: Sequence[RunFolder]) -> str | None:
    """The runs' curves over each other: a panel per score, loss, rate and norm; None where no run has a log.

    Each value is a mean over the rows of an epoch. Markers and colours are those of the runs throughout the page.
    """
    means = [epoch_means(run.rows) for run in runs]
    names = list(dict.fromkeys(name for found in means for name in found))
    panels = sorted((name for name in names if is_score(name)), key=names.index)
    panels += [name for name in names if is_loss(name)] + [name for name in _AXES if name in names]
    if not panels:
        return None
    rows = -(-len(panels) // PANELS_PER_ROW)
    figure = Figure(figsize=(12.6, 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, PANELS_PER_ROW, squeeze=False).flatten()
    for axes, name in zip(grid, panels, strict=False):
        for number, found in enumerate(means):
            curve = found.get(name, {})
            _line(axes, [epoch + 1 for epoch in sorted(curve)], [curve[epoch] for epoch in sorted(curve)], number)
        axes.set_title(_AXES.get(name, name), fontsize=10)
        axes.set_xlabel("epoch", fontsize=8)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return svg(figure)


def class_bars(rows: Sequence[tuple[str, list[float | None]]]) -> str:
    """IoU per class and run: name of the class and a value per run, None where it has none."""
    figure = Figure(figsize=(8.4, 0.8 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    runs = len(rows[0][1])
    thickness = 0.8 / runs
    for run in range(runs):
        places = [place + (run - (runs - 1) / 2) * thickness for place in range(len(rows))]
        axes.barh(places, [values[run] or 0.0 for _, values in rows], 0.92 * thickness, color=COLOURS[run])
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xlabel("IoU", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    return svg(figure)


def svg(figure: Figure) -> str:
    """A figure as a data URL."""
    buffer = io.BytesIO()
    show_names_as_they_are(figure)
    with matplotlib.rc_context({"svg.hashsalt": "modat"}):  # the same figure gives the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _url("image/svg+xml", buffer.getvalue())


def png(path: Path) -> str:
    """A PNG file as a data URL."""
    return _url("image/png", path.read_bytes())


def strip(stored: Strip, kind: str, *, semantic: bool) -> str:
    """One row of a clip's pictures as a data URL.

    Args:
        stored: the clip.
        kind: 'frames', 'truth' or 'prediction'; seconds without label are dark in 'truth'.
        semantic: class numbers mean classes, not object or not.
    """
    pixels: Pixels = stored.frames
    if kind != "frames":
        classes = stored.truth if kind == "truth" else stored.prediction
        pixels = overlaid(pixels, torch.from_numpy(classes.copy()), semantic)
    if kind == "truth":
        pixels = pixels.copy()
        width = pixels.shape[1] // len(stored.seconds)
        for place, labelled in enumerate(stored.labelled):
            if not labelled:
                pixels[:, place * width : (place + 1) * width] //= 4
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=85)
    return _url("image/jpeg", buffer.getvalue())


def classes_in(strips: Mapping[int, Strip]) -> list[int]:
    """Class numbers in the labels and predictions of a clip, background left out."""
    masks = [mask for stored in strips.values() for mask in (stored.truth, stored.prediction)]
    return sorted({int(number) for mask in masks for number in np.unique(mask)} - {0})


def _line(axes: Axes, x: Sequence[int], y: Sequence[float], number: int) -> None:
    axes.plot(x, y, marker=MARKERS[number], markersize=4, color=COLOURS[number], linewidth=1.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
