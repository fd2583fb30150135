"""Checkpoints that a run goes on from: written so that a process killed at any instant leaves a good one behind."""

import functools
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint

from utils.errors import CheckpointError
from utils.files import LAST, write_atomically
from utils.runtime import StopRequested

PREVIOUS = "last.previous.ckpt"
RUN_KEY = "run"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's way to disk: atomic, keeps the checkpoint before the last, loads tensors and containers alone."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `path`; what was there stays beside it as `last.previous.ckpt`."""
        path = Path(path)

        def write(file: Any) -> None:
            torch.save(checkpoint, file)
            if path.exists():
                # Only once the new file is complete, and by a second name: `path` itself is never missing.
                _link(path, path.with_name(PREVIOUS))

        write_atomically(path, write)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint without running anything that it may contain."""
        return read_checkpoint(Path(path), map_location)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The contents of a run's checkpoint.

    Raises:
        CheckpointError: it is missing, cut short, or holds anything but tensors and plain containers.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist.") from error
    except Exception as error:  # torch.load raises whatever the broken bytes lead it into
        line = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"{path} is no readable checkpoint ({type(error).__name__}: {line}).") from error
    if not isinstance(checkpoint, dict) or RUN_KEY not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is no checkpoint of a run (weights alone are loaded by test.sh).")
    return checkpoint


def find_resumable(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in a run's folder that can be read, and what it says of the run.

    Args:
        folder: of the run.
        say: told when the last checkpoint is broken and the one before is taken.

    Returns:
        Its path and its `run` entry (epoch, batch, step, validation_pending); None where the folder has none at all.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    candidates = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    errors = []
    for path in candidates:
        try:
            position = read_checkpoint(path)[RUN_KEY]
        except CheckpointError as error:
            errors.append(str(error))
            continue
        for error_text in errors:
            say(f"warning: {error_text} Going on from the one before, {path.name}, at step {position['step']}.")
        return path, position
    if errors:
        raise CheckpointError(f"{' '.join(errors)} Start anew with --overwrite.")
    return None


def check_order(position: Mapping[str, Any], order: Mapping[str, int]) -> None:
    """See that a run that goes on within an epoch meets the batches that are left of it.

    Args:
        position: the checkpoint's `run` entry.
        order: what the order of batches follows from now, by the names of config keys.

    Raises:
        CheckpointError: the checkpoint was written within an epoch of another order.
    """
    for name, before in position.get("order", {}).items():
        if position["batch"] and order[name] != before:
            raise CheckpointError(
                f"the run stands within epoch {position['epoch'] + 1}, begun with {name}={before}, and {name} is "
                f"{order[name]} now: finish that epoch as it was begun, or start anew with --overwrite."
            )


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR1 while training, so that the run can save and end between two steps.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take the signals over."""
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class RunCheckpoint(Checkpoint):
    """Writes `last.ckpt` each epoch, every `interval` steps, and when a signal asks the run to stop.

    Args:
        folder: of the run.
        interval: optimizer steps between checkpoints within an epoch; 0 = none.
        order: what the order of batches follows from, see `check_order`; `process.accumulate` is batches a step.
        signals: what asks the run to stop.
    """

    def __init__(self, folder: Path, *, interval: int, order: Mapping[str, int], signals: StopSignals) -> None:
        self.path = folder / LAST
        self.interval = interval
        self.order = dict(order)
        self.signals = signals
        self._position = {"epoch": 0, "batch": 0, "validation_pending": False}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the signals over from Lightning, whose handler would end a run of several processes in a deadlock."""
        self.signals.install()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save within an epoch. After its last batch the validation, or the epoch's end, comes first."""
        done = batch_idx + 1
        if done >= trainer.num_training_batches or done % self.order["process.accumulate"]:
            return
        stop = self._agreed(trainer)
        if stop or (self.interval and trainer.global_step % self.interval == 0):
            self._save(trainer, epoch=trainer.current_epoch, batch=done)
        self._end_if(stop)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """When asked to stop, save so that the run goes on with this validation, from its first batch."""
        # Processes may differ by one batch here; they can agree only after those that all of them have.
        common = pl_module.common_val_batches
        if batch_idx >= common:
            return
        if stop := self._agreed(trainer):
            self._save(trainer, epoch=trainer.current_epoch + 1, batch=0, validation_pending=True)
            self._end_if(stop)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the finished epoch."""
        self._save(trainer, epoch=trainer.current_epoch + 1, batch=0)
        self._end_if(self._agreed(trainer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add where the run stands."""
        checkpoint[RUN_KEY] = {**self._position, "step": trainer.global_step, "order": self.order}
        if self._position["validation_pending"]:
            # To Lightning: one batch of the validation begun, none done. It then starts the validation over.
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"] = {
                "total": dict(begun),
                "current": dict(begun),
                "is_last_batch": False,
            }

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Give the signals back."""
        self.signals.restore()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the signals back."""
        self.signals.restore()

    def _save(self, trainer: Trainer, *, epoch: int, batch: int, validation_pending: bool = False) -> None:
        self._position = {"epoch": epoch, "batch": batch, "validation_pending": validation_pending}
        trainer.save_checkpoint(self.path, weights_only=False)

    def _agreed(self, trainer: Trainer) -> int:
        """The signal that any process of the run has received, 0 for none; the same on all of them."""
        if trainer.world_size == 1:
            return self.signals.received
        number = torch.tensor(self.signals.received, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)

    def _end_if(self, stop: int) -> None:
        if stop:
            raise StopRequested(stop, self.path)


class BestWeights(Callback):
    """Keeps the weights of the best epoch for each of some scores.

    Args:
        folder: of the run.
        targets: file name -> how its score is computed from the validation's scores.
    """

    def __init__(self, folder: Path, targets: dict[str, Callable[[dict[str, float]], float]]) -> None:
        self.folder = folder
        self.targets = targets
        self.best: dict[str, dict[str, float]] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the weights whose score is the highest so far; an equal score keeps the earlier ones."""
        for name, score_of in self.targets.items():
            score = score_of(pl_module.val_scores)
            if name in self.best and not score > self.best[name]["score"]:
                continue
            self.best[name] = {"score": score, "epoch": trainer.current_epoch}
            # Sharded strategies gather the weights here, which takes all processes.
            state = trainer.strategy.lightning_module_state_dict()
            if trainer.is_global_zero:
                prefix = "model."
                weights = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
                write_atomically(self.folder / name, functools.partial(torch.save, weights))

    def state_dict(self) -> dict[str, Any]:
        """The best scores so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `state_dict` gave them."""
        self.best = state_dict["best"]


def _link(path: Path, second: Path) -> None:
    """Give a file a second name, replacing what had it; a copy where the file system knows no hard links."""
    temporary = second.with_name(f".{second.name}.writing")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        temporary.write_bytes(path.read_bytes())
    os.replace(temporary, second)
