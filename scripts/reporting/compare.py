"""What differs between runs: their configs, their scores, their clips."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from scripts.engine.plots import epoch_means
from scripts.reporting.runs import RunFolder
from utils.config import SPLITS
from utils.portable import portable

ABSENT = "-"
NOT_COMPARED = ("process.work_dir",)
_SOUNDS = {"silence": "silence", "noise": "noise", "off_screen": "off-screen sounds"}
_WORDS = {
    "miou": "mIoU",
    "f_score": "F over the set",
    "f_score_per_batch": "F, AVSBench's per batch of 2 clips",
    "miou_foreground": "mIoU without background",
    "f_score_foreground": "F without background",
    "miou_published_no_background": "mIoU, AVSBench's 'no background'",
    "f_score_published_no_background": "F, AVSBench's 'no background'",
}


@dataclass(frozen=True)
class Line:
    """A row of the table of scores.

    Attributes:
        group: the test, or the validation.
        label: the score's name.
        values: per run, percent; None where the run has none.
        best: indices of the best runs, to a tenth; none where fewer than two have the score, or all are equal.
    """

    group: str
    label: str
    values: list[float | None]
    best: list[int]


def config_differences(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """Keys whose values differ, and the values per run as text; a key that differs alike in all splits comes once.

    Absolute paths are shortened, see `utils.portable`: the page is given away.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config)
    found = {
        key: [_text(run.config, key) for run in runs]
        for key in keys
        if key not in NOT_COMPARED and len({_text(run.config, key) for run in runs}) > 1
    }
    merged: dict[str, list[str]] = {}
    for key, values in found.items():
        section, _, rest = key.partition(".")
        split, _, leaf = rest.partition(".")
        if section == "dataset" and split in SPLITS and all(found.get(f"dataset.{s}.{leaf}") == values for s in SPLITS):
            key = f"dataset.*.{leaf}"
        merged[key] = [portable(value) for value in values]
    return sorted(merged.items())


def score_lines(runs: Sequence[RunFolder]) -> list[Line]:
    """The table of scores: best validation, every test, and the tests with four sounds."""
    lines = []
    for name in _ordered(score for run in runs for score in _validation(run)):
        lines.append(_line("validation, best epoch", name, [_validation(run).get(name) for run in runs]))
    for title in _ordered(title for run in runs for title in run.tests):
        scores = _ordered(key for run in runs for key in run.tests.get(title, {}) if key in _WORDS)
        lines += [_line(title, name, [run.tests.get(title, {}).get(name) for run in runs]) for name in scores]
    for split in _ordered(split for run in runs for split in run.robust):
        conditions = [run.robust.get(split, {}).get("conditions", {}) for run in runs]
        group = f"{split}, four sounds"
        lines.append(_line(group, "mIoU, own sound", [found.get("own", {}).get("miou") for found in conditions]))
        for sound, words in _SOUNDS.items():
            painted = [found.get(sound, {}).get("fpr") for found in conditions]
            lines.append(_line(group, f"pixels painted on {words}", painted, lower_is_better=True))
        mean = [run.robust.get(split, {}).get("balanced", {}).get("mean", {}).get("miou") for run in runs]
        lines.append(_line(group, "G of mIoU, mean of the other sounds", mean))
    if any(run.task == "avss" for run in runs):  # there, F is a mean over classes
        lines = [replace(line, label="F") if line.label == _WORDS["f_score"] else line for line in lines]
    return [line for line in lines if any(value is not None for value in line.values)]


def clip_table(runs: Sequence[RunFolder], title: str) -> pd.DataFrame:
    """mIoU per clip (rows) and run (columns, by index) of a test, for the clips that all runs with the test have.

    The clips on which the runs differ most come first; of a single run, the worst.
    """
    tested = {index: run.clips[title] for index, run in enumerate(runs) if title in run.clips}
    if not tested:
        return pd.DataFrame()
    table = pd.concat(tested, axis=1, join="inner")
    key = -(table.max(axis=1) - table.min(axis=1)) if len(tested) > 1 else table.iloc[:, 0]
    return table.loc[key.sort_values(kind="stable").index]


def other_data(runs: Sequence[RunFolder], title: str) -> bool:
    """Whether the runs' tests were made on different data, as far as their results state it."""
    digests = {run.tests[title]["origin"]["data"]["digest"] for run in runs if "origin" in run.tests.get(title, {})}
    return len(digests) > 1


def class_differences(runs: Sequence[RunFolder], title: str, count: int) -> list[tuple[str, list[float | None]]]:
    """IoU of the classes per run, those with the largest differences first; classes that never occur are left out."""
    tables = [run.tests.get(title, {}).get("per_class", {}) for run in runs]
    rows = []
    for name in _ordered(name for table in tables for name, values in table.items() if values["frames"]):
        rows.append((name, [table[name]["iou"] if name in table else None for table in tables]))

    def spread(row: tuple[str, list[float | None]]) -> float:
        known = [value for value in row[1] if value is not None]
        return max(known) - min(known) if len(known) > 1 else known[0]

    return sorted(rows, key=spread, reverse=True)[:count]


def _validation(run: RunFolder) -> dict[str, float]:
    """Scores of the epoch with the best mIoU."""
    curves = {name: curve for name, curve in epoch_means(run.rows).items() if name.startswith("val_")}
    if "val_miou" not in curves:
        return {}
    best = max(curves["val_miou"], key=lambda epoch: (curves["val_miou"][epoch], -epoch))
    return {name.removeprefix("val_"): curve[best] for name, curve in curves.items() if best in curve}


def _line(group: str, name: str, values: Sequence[Any], *, lower_is_better: bool = False) -> Line:
    percent = [100 * float(value) if isinstance(value, int | float) else None for value in values]
    rounded = [None if value is None else round(value, 1) for value in percent]
    known = {value for value in rounded if value is not None}
    top = (min(known) if lower_is_better else max(known)) if len(known) > 1 else math.nan
    best = [index for index, value in enumerate(rounded) if value == top]
    return Line(group, _WORDS.get(name, name), percent, best)


def _ordered(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def _text(config: dict[str, Any], key: str) -> str:
    if key in config:
        return str(config[key])
    inside = {name: value for name, value in config.items() if name.startswith(f"{key}.")}
    return "{...}" if inside else ABSENT
