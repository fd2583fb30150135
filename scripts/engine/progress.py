"""What a training run shows while it works: a bar in a terminal, a line now and then in a file."""

import sys
import time
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress(Callback):
    """Epoch, step, loss parts, clips a second, and the time left of the epoch and of the run.

    Args:
        console: where to; default stdout.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._line_due = 0.0
        self._began = 0.0
        self._clips = 0
        self._batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._began = time.monotonic()
        if trainer.is_global_zero and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task("", text="")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Show a training step."""
        self._batches += 1
        self._clips += len(batch["name"]) * trainer.world_size
        if not trainer.is_global_zero:
            return
        total = int(trainer.num_training_batches)
        seconds = time.monotonic() - self._began
        a_batch = seconds / self._batches
        left = total - batch_idx - 1
        run_left = left + (trainer.max_epochs - trainer.current_epoch - 1) * total if trainer.max_epochs else left
        parts = " ".join(f"{name.removesuffix('_loss')} {value:.4f}" for name, value in pl_module.last_losses().items())
        time_left = f"epoch {clock(left * a_batch)} run {clock(run_left * a_batch)}"
        text = f"{parts} | {self._clips / seconds:.2f} clips/s | {time_left}"
        self._show(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", batch_idx + 1, total, text)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show a validation step."""
        if trainer.is_global_zero:
            self._show(
                f"epoch {trainer.current_epoch + 1} validation", batch_idx + 1, int(trainer.num_val_batches[0]), ""
            )

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the scores, which stay in the scrolled text."""
        if trainer.is_global_zero:
            scores = "  ".join(f"{name} {value:.4f}" for name, value in pl_module.val_scores.items())
            self.console.print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} validation: {scores}")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def _show(self, title: str, done: int, total: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=title, completed=done, total=total, text=text)
            return
        now = time.monotonic()
        if now >= self._line_due or (done == total and text):
            self._line_due = now + SECONDS_BETWEEN_LINES
            self.console.print(f"{title} {done}/{total} {text}".rstrip())

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
