"""The record of a run on disk: `metrics.csv` and TensorBoard.

The CSV has a row every `process.log_interval` steps with the step's losses, and one each validation with the scores. No
row holds a time, so a run that was interrupted and went on leaves the same file as one that ran through.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.tensorboard import SummaryWriter

from scripts.engine.loop import AVSTraining
from scripts.engine.visualize import save_curves

METRICS_FILE = "metrics.csv"


class CsvLog:
    """A CSV file that grows by rows, and can be cut back to an earlier step.

    Args:
        path: the file; its header is written with the first row.
        columns: of the file; a row leaves blank what it does not have.
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
        """Drop what was logged after a step, and a last row that a killed process left incomplete.

        Args:
            step: optimizer steps done.
            validation_pending: the validation after `step` is still to come, so its row goes too.
        """
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        kept = [
            row
            for row in rows
            if len(row) == len(self.columns)
            and (
                _step(header, row) < step
                or (_step(header, row) == step and not (validation_pending and _scores(header, row)))
            )
        ]
        replacement = self.path.with_suffix(".tmp")
        with replacement.open("w", newline="") as file:
            csv.writer(file).writerows([self.columns, *kept])
        replacement.replace(self.path)

    def rows(self) -> list[dict[str, float]]:
        """All rows as numbers, without their blanks."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


class RunLog:
    """Rows of training and validation, to CSV and TensorBoard.

    Args:
        folder: of the run.
        columns: of the CSV.
        resume_step: optimizer steps already done; what was logged after it is dropped. None starts the log anew.
        validation_pending: see `CsvLog.keep_until`.
    """

    def __init__(
        self,
        folder: Path,
        columns: Sequence[str],
        *,
        resume_step: int | None = None,
        validation_pending: bool = False,
    ) -> None:
        self.csv = CsvLog(folder / METRICS_FILE, columns)
        if resume_step is None:
            self.csv.path.unlink(missing_ok=True)
        else:
            self.csv.keep_until(resume_step, validation_pending=validation_pending)
        purge = None if resume_step is None else resume_step + 1 - validation_pending
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def add(self, row: Mapping[str, float | int]) -> None:
        """Add a row; it has epoch, step, and any of the other columns."""
        self.csv.append(row)
        for key, value in row.items():
            if key != "step":
                self._board.add_scalar(
                    key.replace("_", "/", 1) if key.startswith(("train_", "val_")) else key, value, row["step"]
                )

    def flush(self) -> None:
        """Hand TensorBoard's rows to the disk."""
        self._board.flush()

    def close(self) -> None:
        """End the log."""
        self._board.close()


def _step(header: list[str], row: list[str]) -> float:
    try:
        return float(row[header.index("step")])
    except ValueError:
        return math.inf


def _scores(header: list[str], row: list[str]) -> bool:
    return any(value for name, value in zip(header, row, strict=False) if name.startswith("val_"))


class RunLogger(Callback):
    """Rows of losses and scores, and the curves drawn of them each epoch.

    Args:
        folder: of the run.
        interval: optimizer steps between rows.
        accumulate: batches an optimizer step.
        title: of the curves.

    Attributes:
        record: where they go; the main process's alone is set.
    """

    def __init__(self, folder: Path, *, interval: int, accumulate: int, title: str) -> None:
        self.record: RunLog | None = None
        self.folder = folder
        self.interval = interval
        self.accumulate = accumulate
        self.title = title

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the losses of a step."""
        assert isinstance(pl_module, AVSTraining)
        stepped = (batch_idx + 1) % self.accumulate == 0 or batch_idx + 1 == trainer.num_training_batches
        if not stepped or trainer.global_step % self.interval:
            return
        losses = pl_module.shared_losses()
        if self.record is not None:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self._add(trainer, {"lr": float(rate), **{f"train_{name}": value for name, value in losses.items()}})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores of an epoch."""
        assert isinstance(pl_module, AVSTraining)
        if self.record is not None:
            self._add(trainer, {f"val_{name}": value for name, value in pl_module.val_scores.items()})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves."""
        if self.record is not None:
            self.record.flush()
            if self.record.csv.path.exists():
                save_curves(self.record.csv.path, self.folder / "curves.png", title=self.title)

    def _add(self, trainer: Trainer, values: dict[str, float]) -> None:
        assert self.record is not None
        self.record.add({"epoch": trainer.current_epoch, "step": trainer.global_step, **values})
