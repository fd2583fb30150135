"""The record of a run on disk: `metrics.csv`, `experts.csv`, TensorBoard and what is drawn of them.

The CSV has a row with the losses every `process.log_interval` optimizer steps, and a row with the scores per
validation. `experts.csv` has the experts' load at the same steps. No row holds a time, so that a resumed run leaves the
same files as an uninterrupted one.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.engine.plots import save_curves, save_experts
from scripts.engine.trackers import Tracker, open_tracker
from utils.files import write_atomically

METRICS_FILE = "metrics.csv"
EXPERTS_FILE = "experts.csv"


class CsvLog:
    """A CSV file that grows by rows, and can be cut back to an earlier step.

    Args:
        path: the file; its header is written with the first row.
        columns: of the file; a row leaves blank what it lacks.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = list(columns)

    def append(self, row: Mapping[str, float | int]) -> None:
        """Add a row; numbers are written so that they read back exactly."""
        new = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if new:
                writer.writeheader()
            writer.writerow({key: repr(value) for key, value in row.items()})

    def keep_until(self, step: int, *, validation_pending: bool = False) -> None:
        """Drop rows after a step, and a last row that a killed process left incomplete.

        Rows of a file with other columns, of an earlier version or config, are kept in the columns that both have.

        Args:
            step: optimizer steps done.
            validation_pending: the validation after `step` is still to be done: its row is dropped too.

        Raises:
            CheckpointError: the file cannot be replaced.
        """
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        kept = [
            row
            for row in rows
            if len(row) == len(header)
            and (
                _step(header, row) < step
                or (_step(header, row) == step and not (validation_pending and _scores(header, row)))
            )
        ]
        text = io.StringIO(newline="")
        if header != self.columns:
            kept = [[dict(zip(header, row, strict=True)).get(name, "") for name in self.columns] for row in kept]
        csv.writer(text).writerows([self.columns, *kept])
        write_atomically(self.path, lambda file: file.write(text.getvalue().encode()))

    def rows(self) -> list[dict[str, float]]:
        """All rows as numbers, without their blanks."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


class RunLog:
    """Rows of training and validation, in CSV and in TensorBoard or what `process.logger` names.

    Args:
        folder: of the run.
        columns: of the CSV.
        experts: columns of `experts.csv`, see ExpertLoad; none where the model has no experts.
        title: of the curves.
        logger: `process.logger`.
        config: the whole config as plain values, for services.
        resume_step: optimizer steps already done; later rows are dropped. None starts the log anew.
        validation_pending: see `CsvLog.keep_until`.
    """

    def __init__(
        self,
        folder: Path,
        columns: Sequence[str],
        *,
        experts: Sequence[str] = (),
        title: str = "",
        logger: str = "tensorboard",
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
        validation_pending: bool = False,
    ) -> None:
        self.csv = CsvLog(folder / METRICS_FILE, columns)
        self.experts = CsvLog(folder / EXPERTS_FILE, ["epoch", "step", *experts])
        self.curves = folder / "curves.png"
        self.title = title
        if resume_step is None:
            self.csv.path.unlink(missing_ok=True)
            self.experts.path.unlink(missing_ok=True)
        else:
            self.csv.keep_until(resume_step, validation_pending=validation_pending)
            self.experts.keep_until(resume_step)
        purge = None if resume_step is None else resume_step + 1 - validation_pending
        self._tracker: Tracker = open_tracker(
            logger, folder, config or {}, resume=resume_step is not None, purge_step=purge
        )

    def add(self, row: Mapping[str, float | int]) -> None:
        """Add a row; it has epoch, step, and any of the other columns."""
        self.csv.append(row)
        named = {
            key.replace("_", "/", 1) if key.startswith(("train_", "val_")) else key: value
            for key, value in row.items()
            if key != "step"
        }
        self._tracker.scalars(named, int(row["step"]))

    def add_experts(self, row: Mapping[str, float | int]) -> None:
        """Add a row of the experts' load; it has epoch, step, and the columns of the experts."""
        self.experts.append(row)
        named = {f"experts/{key}": value for key, value in row.items() if key not in ("epoch", "step")}
        self._tracker.scalars(named, int(row["step"]))

    def end_epoch(self, step: int) -> None:
        """Flush the tracker's rows, draw the curves and the experts' load; `step`: optimizer steps done."""
        if self.csv.path.exists():
            save_curves(self.csv.path, self.curves, title=self.title)
        if self.experts.path.exists() and self.experts.rows():
            picture = self.experts.path.with_suffix(".png")
            save_experts(self.experts.path, picture, title=self.title)
            self._tracker.image("experts/load", picture, step)
        self._tracker.flush()

    def close(self) -> None:
        """Close the log."""
        self._tracker.close()


def _step(header: list[str], row: list[str]) -> float:
    try:
        return float(row[header.index("step")])
    except ValueError:
        return math.inf


def _scores(header: list[str], row: list[str]) -> bool:
    return any(value for name, value in zip(header, row, strict=False) if name.startswith("val_"))
