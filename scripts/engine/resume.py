"""Resumable checkpoints, written so that a process killed at any instant leaves a good one behind.

A checkpoint is a dictionary of tensors and plain containers: `state_dict` (the model's weights), `optimizer`,
`schedule`, `precision` (the loss scale of fp16), `best` (the best scores so far), `run` (where the run stands) and
`record` (its origin, see provenance.py).
"""

import functools
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import with_record
from utils.errors import CheckpointError
from utils.files import LAST, write_atomically

PREVIOUS = "last.previous.ckpt"
RUN_KEY = "run"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        epoch: the epoch that comes next or that is under way, from 0.
        batch: batches of it that are done.
        step: optimizer steps done.
        validation_pending: the validation of epoch `epoch` - 1 is still to be done.
        precision: of the run, as 'auto' was resolved when it began.
        order: the settings that the order of batches depends on, by config key; see `check_order`.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    validation_pending: bool = False
    precision: str = "32"
    order: dict[str, int] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """As plain containers."""
        return asdict(self)


def save_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint atomically; the one before stays beside it as `last.previous.ckpt`.

    Raises:
        CheckpointError: the disk is full, read-only or otherwise refuses; what was there is untouched.
    """

    def write(file: Any) -> None:
        torch.save(dict(checkpoint), file)
        if path.exists():
            # Only once the new file is complete, and as a second name: `path` itself is never missing.
            _link(path, path.with_name(PREVIOUS))

    write_atomically(path, write)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A run's checkpoint, on the CPU. Nothing that the file may contain is run.

    Raises:
        CheckpointError: it is missing, cut short, or holds anything but tensors and plain containers.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist.") from error
    except Exception as error:  # torch.load raises whatever the broken bytes lead it into
        line = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"{path} is not a readable checkpoint ({type(error).__name__}: {line}).") from error
    if not isinstance(checkpoint, dict) or RUN_KEY not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is not the checkpoint of a run (test.sh loads plain weights).")
    return checkpoint


def find_resumable(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest readable checkpoint in a run's folder.

    Args:
        folder: of the run.
        say: receives a warning when the last checkpoint is broken and the one before is used.

    Returns:
        Its path and contents; None where the folder has no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and none is readable.
    """
    errors: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            errors.append(str(error))
            continue
        for text in errors:
            step = checkpoint[RUN_KEY]["step"]
            say(f"warning: {text} Going on from the one before, {path.name}, at step {step}.")
        return path, checkpoint
    if errors:
        raise CheckpointError(f"{' '.join(errors)} Start anew with --overwrite.")
    return None


def check_order(position: Mapping[str, Any], order: Mapping[str, int]) -> None:
    """Check that a run resumed within an epoch meets the batches that are left of it.

    Args:
        position: the checkpoint's `run` entry.
        order: the settings that the order of batches depends on now, by config key.

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
    """Records SIGTERM, SIGINT and SIGUSR1 during training, so that the run can save and end between two steps.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        """Install the handlers."""
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers of before."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class BestWeights:
    """Keeps the weights of the best epoch for each of some scores.

    Args:
        folder: of the run.
        targets: file name -> how its score is computed from the validation's scores.
        record: of the run, see provenance.py; written into the files with the epoch and its scores.
    """

    def __init__(
        self,
        folder: Path,
        targets: Mapping[str, Callable[[Mapping[str, float]], float]],
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.targets = dict(targets)
        self.record = dict(record or {})
        self.best: dict[str, dict[str, float]] = {}

    def update(
        self, scores: Mapping[str, float], epoch: int, weights: Callable[[], Mapping[str, Tensor]], *, write: bool
    ) -> None:
        """Write the weights where a score is the highest so far; an equal score keeps the earlier ones.

        Args:
            scores: of the validation.
            epoch: from 0.
            weights: gives the model's weights; called on all processes, since sharded strategies gather them.
            write: whether this process writes the files.
        """
        for name, score_of in self.targets.items():
            score = score_of(scores)
            if name in self.best and not score > self.best[name]["score"]:
                continue
            self.best[name] = {"score": score, "epoch": epoch}
            state = weights()
            if write:
                record = {**self.record, "epoch": epoch + 1, "scores": {"val": dict(scores)}}
                write_atomically(self.folder / name, functools.partial(torch.save, with_record(state, record)))


def _link(path: Path, second: Path) -> None:
    """Give a file a second name, replacing what had it; a copy where the file system has no hard links."""
    temporary = second.with_name(f".{second.name}.writing")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        temporary.write_bytes(path.read_bytes())
    os.replace(temporary, second)
