"""A loss that is infinite or NaN stops the run before the optimizer step."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from scripts.engine.fabric import all_reduce
from scripts.engine.resume import Position
from utils.errors import UserError

NONFINITE_FILE = "nonfinite.json"


class NonFiniteLossError(UserError):
    """The loss became infinite or NaN; the run stopped before the optimizer step."""


def stop_if_not_finite(
    losses: Mapping[str, Tensor], batch: Mapping[str, Any], *, position: Position, folder: Path, fabric: Fabric
) -> None:
    """Check the losses of a batch on all processes.

    Args:
        losses: from the criterion.
        batch: they belong to; its clips are named.
        position: where the run stands.
        folder: of the run, where the step is described in JSON.
        fabric: for the processes.

    Raises:
        NonFiniteLossError: one of the losses is not finite, on this process or another.
    """
    broken = ~torch.isfinite(torch.stack([loss.detach() for loss in losses.values()])).all()
    if not int(all_reduce(broken.int(), "MAX", fabric)):
        return
    values = {name: repr(float(loss)) for name, loss in losses.items()}
    report = {
        "epoch": position.epoch,
        "batch": position.batch,
        "step": position.step,
        "process": fabric.global_rank,
        "clips": list(batch["name"]),
        "losses": values,
    }
    path = folder / (f"nonfinite_{fabric.global_rank}.json" if fabric.world_size > 1 else NONFINITE_FILE)
    path.write_text(json.dumps(report, indent=2) + "\n")
    parts = ", ".join(f"{name} {value}" for name, value in values.items())
    raise NonFiniteLossError(
        f"the loss of step {position.step} is not finite ({parts}; clips {', '.join(batch['name'])}), on this process "
        f"or another; described in {path}. A lower optimizer.lr, process.clip_grad_norm=1 or process.precision=32 "
        "help; process.detect_anomaly=True names the operation."
    )
