"""Plots of a run's numbers: learning curves, the experts' load over training, scores per class."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from utils.errors import DataError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""Told apart by colour-blind readers too (Okabe & Ito, 2008); lines differ by their markers as well."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GRADIENT_NORM = "gradient_norm"
BARS_PER_COLUMN = 36


def save_curves(metrics_csv: str | Path, path: str | Path, *, title: str = "") -> None:
    """Draw a run's log, `metrics.csv`: losses and scores per epoch, learning rate and gradient norm per step.

    Numeric columns with 'loss' or 'total' in their names are losses, those with 'iou' or 'f_' scores; both are means
    over the rows of an epoch. The gradient norm is that before clipping, and has a panel where it was logged.

    Args:
        metrics_csv: a table with a column `epoch`.
        path: PNG to write.
        title: above everything.

    Raises:
        DataError: the table is missing or lacks the column `epoch`.
    """
    rows = read_rows(metrics_csv)
    curves = epoch_means(rows)
    losses = {name: curve for name, curve in curves.items() if is_loss(name)}
    scores = {name: curve for name, curve in curves.items() if is_score(name)}
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    (left, right), (lower_left, lower_right) = figure.subplots(2, 2, height_ratios=(3, 2))
    panels = ((left, "losses", losses, "weighted loss"), (right, "scores", scores, "score, 0 to 1"))
    for axes, heading, chosen, label in panels:
        mixed = any(not name.startswith("train") for name in chosen)
        for number, (name, curve) in enumerate(sorted(chosen.items())):
            epochs = sorted(curve)
            axes.plot(
                [epoch + 1 for epoch in epochs],
                [curve[epoch] for epoch in epochs],
                "--" if name.startswith("train") and mixed else "-",
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                label=name,
                color=COLOURS[number % len(COLOURS)],
                linewidth=1.4,
            )
        _finish(axes, heading, "epoch", label)
        if chosen:
            axes.legend(fontsize=8)
        else:
            _note(axes, "none logged yet")
    _over_steps(lower_left, rows, "lr", "learning rate", "not logged")
    note = "logged where process.clip_grad_norm is set"
    _over_steps(lower_right, rows, GRADIENT_NORM, "gradient norm before clipping", note)
    if title:
        figure.suptitle(title)
    save_figure(figure, path)


def save_experts(experts_csv: str | Path, path: str | Path, *, title: str = "") -> None:
    """Draw the experts' load over training, `experts.csv`: a row per expert, a column per logged step.

    Args:
        experts_csv: as RunLog writes it, see `expert_load.ExpertLoad`.
        path: PNG to write.
        title: above everything.

    Raises:
        DataError: the table is missing, or has no load.
    """
    rows = read_rows(experts_csv)
    branches = experts_by_branch(rows)
    if not branches:
        raise DataError(f"{experts_csv}: the table has no column of an expert's load.")
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(4.2 + 4.2 * len(branches), 4.6), dpi=110, layout="constrained")
    top = max(max(values) for experts in branches.values() for values in experts.values())
    for axes, (branch, experts) in zip(
        figure.subplots(1, len(branches), squeeze=False)[0], branches.items(), strict=True
    ):
        shares = np.array(list(experts.values()))
        image = axes.imshow(
            100 * shares,
            aspect="auto",
            cmap="cividis",
            vmin=0,
            vmax=100 * top,
            interpolation="nearest",
            extent=(steps[0], max(steps[-1], steps[0] + 1), len(shares) - 0.5, -0.5),
        )
        axes.set_yticks(range(len(shares)), [str(number + 1) for number in range(len(shares))], fontsize=8)
        dropped = [row[f"{branch}_dropped"] for row in rows if f"{branch}_dropped" in row]
        axes.set_title(f"{branch} experts\nno expert's: {100 * dropped[-1]:.1f} % of pixels at the end", fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("expert")
    figure.colorbar(image, ax=figure.axes, label="pixels that the expert processes, %", shrink=0.9)
    if title:
        figure.suptitle(title)
    save_figure(figure, path)


def save_class_bars(per_class: Mapping[str, Mapping[str, float]], path: str | Path, *, title: str = "") -> None:
    """Draw IoU and F of every class that occurs, best first, with the number of frames that each is a mean of.

    Args:
        per_class: class name -> iou, f_score, frames; classes without frames are left out.
        path: PNG to write.
        title: above everything.

    Raises:
        ValueError: no class has a frame.
    """
    found = sorted(
        ((name, values) for name, values in per_class.items() if values["frames"]), key=lambda item: -item[1]["iou"]
    )
    if not found:
        raise ValueError(f"{path}: no class has a frame")
    columns = [found[at : at + BARS_PER_COLUMN] for at in range(0, len(found), BARS_PER_COLUMN)]
    longest = max(len(column) for column in columns)
    height = 1.1 + 0.24 * longest
    figure = Figure(figsize=(5.6 * len(columns), height), dpi=110, layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        places = np.arange(len(column))
        iou, f = ([values[key] for _, values in column] for key in ("iou", "f_score"))
        axes.barh(places - 0.2, iou, 0.4, label="IoU", color=COLOURS[0])
        axes.barh(places + 0.2, f, 0.4, label="F", color=COLOURS[4])
        axes.set_yticks(places, [f"{name} ({int(values['frames'])})" for name, values in column], fontsize=7)
        axes.set_ylim(longest - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel("score; in brackets: frames")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8)
    if title:
        figure.suptitle(title, x=0.02, ha="left")
    save_figure(figure, path)


def read_curves(metrics_csv: str | Path) -> dict[str, dict[int, float]]:
    """Column -> epoch -> mean of the epoch's values, from a CSV log; blanks and values that are not finite are skipped.

    Raises:
        DataError: the table is missing or lacks the column `epoch`.
    """
    return epoch_means(read_rows(metrics_csv))


def read_rows(table: str | Path) -> list[dict[str, float]]:
    """The rows of a CSV log as finite numbers; blanks are left out, and rows without an epoch.

    Raises:
        DataError: the table is missing or lacks the column `epoch`.
    """
    file = Path(table)
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
            columns = list(rows[0]) if rows else []
    except OSError as error:
        raise DataError(
            f"{file}: the log cannot be read ({error.strerror}); curves are drawn after training."
        ) from error
    if rows and "epoch" not in columns:
        raise DataError(f"{file}: the log has no column 'epoch', only {', '.join(columns)}.")
    numbers = [{name: value for name in columns if (value := _number(row[name])) is not None} for row in rows]
    return [row for row in numbers if "epoch" in row]


def epoch_means(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """Column -> epoch -> mean of the epoch's values."""
    values: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        for column, value in row.items():
            if column not in ("epoch", "step"):
                values.setdefault(column, {}).setdefault(int(row["epoch"]), []).append(value)
    return {name: {e: sum(v) / len(v) for e, v in by_epoch.items()} for name, by_epoch in values.items()}


def experts_by_branch(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[int, list[float]]]:
    """Branch -> expert, from 0 -> its share at each row of `experts.csv`."""
    found: dict[str, dict[int, list[float]]] = {}
    for name in rows[-1] if rows else ():
        branch, _, expert = name.rpartition("_")
        if branch and expert.isdigit():
            found.setdefault(branch, {})[int(expert)] = [row.get(name, math.nan) for row in rows]
    return found


def is_loss(name: str) -> bool:
    """Whether a column of the log is a loss."""
    return "loss" in name or "total" in name


def is_score(name: str) -> bool:
    """Whether a column of the log is a score."""
    return not is_loss(name) and ("iou" in name or "f_" in name)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG; its folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    show_names_as_they_are(figure)
    # Without a date in the file, the same run gives the same bytes.
    figure.savefig(path, format="png", metadata={"Software": None})


def show_names_as_they_are(figure: Figure) -> None:
    """Draw dollar signs in names of clips, classes and runs; Matplotlib would read a formula between two of them."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def _over_steps(axes: Axes, rows: Sequence[Mapping[str, float]], column: str, label: str, missing: str) -> None:
    points = [(row["step"], row[column]) for row in rows if column in row and "step" in row]
    if points:
        axes.plot(*zip(*points, strict=True), color=COLOURS[0], linewidth=1.2)
    else:
        _note(axes, missing)
    _finish(axes, "", "optimizer step", label)


def _finish(axes: Axes, heading: str, below: str, beside: str) -> None:
    axes.set_title(heading)
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9, color="#555555")


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
