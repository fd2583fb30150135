"""A loss that is infinite or NaN stops the run, and nothing that it touched is saved."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor

from scripts.engine.fabric import OnHost, all_reduce
from scripts.engine.resume import Position
from utils.errors import UserError

NONFINITE_FILE = "nonfinite.json"


class NonFiniteLossError(UserError):
    """The loss became infinite or NaN; the run stopped."""


class _Step(NamedTuple):
    """A step whose losses are not read yet: where it stands, its clips, and the losses with whether one is broken."""

    where: dict[str, int]
    clips: list[str]
    names: list[str]
    values: OnHost


class FiniteCheck:
    """Checks the losses of every step on all processes.

    On a CPU before the backward pass. On a GPU the processor would have to wait for the loss in every step; there the
    losses are copied to the host beside the work that follows, and read when the next step has its losses. Weights may
    have taken one broken step by then, so `finish` comes before they are saved or validated.

    Args:
        folder: of the run, where a broken step is described in JSON.
        fabric: for the processes.
        late: read a step later; None: on a GPU.
    """

    def __init__(self, folder: Path, fabric: Fabric, *, late: bool | None = None) -> None:
        self.folder = folder
        self.fabric = fabric
        self.late = fabric.device.type == "cuda" if late is None else late
        self._waiting: _Step | None = None

    def add(self, losses: Mapping[str, Tensor], batch: Mapping[str, Any], position: Position) -> None:
        """Check the losses of a batch, or of the batch before it.

        Args:
            losses: from the criterion.
            batch: they belong to; its clips are named.
            position: where the run stands.

        Raises:
            NonFiniteLossError: one of the losses is not finite, on this process or another.
        """
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        broken = all_reduce((~torch.isfinite(values)).any().float(), "MAX", self.fabric)
        where = {"epoch": position.epoch, "batch": position.batch, "step": position.step}
        step = _Step(where, list(batch["name"]), list(losses), OnHost(torch.cat([values, broken[None]])))
        earlier, self._waiting = (self._waiting, step) if self.late else (step, None)
        if earlier is not None:
            self._read(earlier)

    def finish(self) -> None:
        """Check the step that has not been read yet, if any.

        Raises:
            NonFiniteLossError: see `add`.
        """
        earlier, self._waiting = self._waiting, None
        if earlier is not None:
            self._read(earlier)

    def _read(self, step: _Step) -> None:
        *losses, broken = step.values.read()
        if not broken:
            return
        values = {name: repr(loss) for name, loss in zip(step.names, losses, strict=True)}
        rank = self.fabric.global_rank
        path = self.folder / (f"nonfinite_{rank}.json" if self.fabric.world_size > 1 else NONFINITE_FILE)
        report = {**step.where, "process": rank, "clips": step.clips, "losses": values}
        path.write_text(json.dumps(report, indent=2) + "\n")
        parts = ", ".join(f"{name} {value}" for name, value in values.items())
        raise NonFiniteLossError(
            f"the loss of step {step.where['step']} is not finite ({parts}; clips "
            f"{', '.join(step.clips)}), on this process or another; described in {path}. A lower optimizer.lr, "
            "process.clip_grad_norm=1 or process.precision=32 help; process.detect_anomaly=True names the operation."
        )
