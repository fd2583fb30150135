"""What a training run shows while it works: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch import Tensor

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_FRAMES = 0.25  # of the bar


class TrainingProgress:
    """Epoch, step, losses, clips per second, and the time left in the epoch and in the run.

    A context manager: it leaves the terminal as it was, whatever ends the run.

    Args:
        epochs: of the run.
        console: where to write; default stdout.
        quiet: show nothing, as the processes but the first do.
    """

    def __init__(self, epochs: int, console: Console | None = None, *, quiet: bool = False) -> None:
        self.epochs = epochs
        self.console = console or Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self.quiet = quiet
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._due = 0.0
        self._seconds = 0.0
        self._clips = 0
        self._batches = 0
        self._before = time.monotonic()

    def __enter__(self) -> "TrainingProgress":
        """Start the bar, where there is a terminal."""
        if not self.quiet and self.console.is_terminal:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(TextColumn("{task.description}"), *columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("", text="")
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def begin_training(self) -> None:
        """Start the clock of training batches; what came before does not count."""
        self._before = time.monotonic()

    def train(self, epoch: int, done: int, total: int, clips: int, losses: Mapping[str, Tensor]) -> None:
        """Show a training batch.

        Args:
            epoch: from 0.
            done: batches of the epoch that are done.
            total: batches of the epoch.
            clips: of this batch, on all processes.
            losses: of this batch; read only when they are shown.
        """
        now = time.monotonic()
        self._seconds, self._before = self._seconds + now - self._before, now
        self._batches += 1
        self._clips += clips
        if not self._is_due(last=done == total):
            return
        per_batch = self._seconds / self._batches
        left = total - done
        run_left = left + (self.epochs - epoch - 1) * total
        parts = " ".join(f"{name.removesuffix('_loss')} {float(value):.4f}" for name, value in losses.items())
        time_left = f"epoch {clock(left * per_batch)} run {clock(run_left * per_batch)}"
        text = f"{parts} | {self._clips / max(self._seconds, 1e-9):.2f} clips/s | {time_left}"
        self._show(f"epoch {epoch + 1}/{self.epochs}", done, total, text)

    def validate(self, epoch: int, done: int, total: int) -> None:
        """Show a validation batch."""
        if self._is_due(last=False):
            self._show(f"epoch {epoch + 1} validation", done, total, "")

    def scores(self, epoch: int, scores: Mapping[str, float]) -> None:
        """Print the scores of an epoch; on a terminal they stay above the bar."""
        if not self.quiet:
            text = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            self.console.print(f"epoch {epoch + 1}/{self.epochs} validation: {text}")

    def _is_due(self, *, last: bool) -> bool:
        now = time.monotonic()
        if self.quiet or not (last or now >= self._due):
            return False
        self._due = now + (SECONDS_BETWEEN_FRAMES if self._bar is not None else SECONDS_BETWEEN_LINES)
        return True

    def _show(self, title: str, done: int, total: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=title, completed=done, total=total, text=text)
        else:
            self.console.print(f"{title} {done}/{total} {text}".rstrip())


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
