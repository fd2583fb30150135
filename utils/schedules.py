"""Learning-rate schedules of `process.lr_schedule`."""

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR

from utils.errors import ConfigError
from utils.registry import suggestion

OPTIONS: dict[str, dict[str, float | int]] = {
    "StepLR": {"step_size": 35, "gamma": 0.67},
    "cosine": {"warmup_steps": 0, "min_lr": 0.0},
}


def build_schedule(cfg: Mapping[str, Any], optimizer: Optimizer, total_steps: int) -> dict[str, Any]:
    """Build a schedule.

    Args:
        cfg: `dict(type='StepLR', step_size=epochs, gamma=...)`, or `dict(type='cosine',
            warmup_steps=..., min_lr=...)`: linear from 0 over the warm-up, then half a cosine down to `min_lr`.
        optimizer: whose learning rate is scheduled.
        total_steps: number of optimizer steps of the whole run.

    Returns:
        `scheduler`, and `interval`: 'epoch' or 'step', how often it is stepped.

    Raises:
        ConfigError: an unknown type or key, or values out of range.
    """
    options = validated(cfg)
    if cfg["type"] == "StepLR":
        scheduler: LRScheduler = StepLR(optimizer, step_size=int(options["step_size"]), gamma=options["gamma"])
        return {"scheduler": scheduler, "interval": "epoch"}
    warmup, floor = int(options["warmup_steps"]), options["min_lr"] / optimizer.defaults["lr"]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}


def validated(cfg: Mapping[str, Any]) -> dict[str, float]:
    """The schedule's options with defaults filled in.

    Raises:
        ConfigError: an unknown type or key, or values out of range.
    """
    if not isinstance(cfg, Mapping):
        raise ConfigError(
            f"process.lr_schedule={cfg!r}: give None or dict(type=...), with type {' or '.join(OPTIONS)}."
        )
    kind = cfg.get("type")
    if kind not in OPTIONS:
        raise ConfigError(f"process.lr_schedule.type={kind!r}: {suggestion(str(kind), list(OPTIONS))}")
    for key, value in cfg.items():
        if key == "type":
            continue
        if key not in OPTIONS[kind]:
            raise ConfigError(
                f"process.lr_schedule.{key} is not an option of {kind}; {suggestion(key, list(OPTIONS[kind]))}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(f"process.lr_schedule.{key}={value!r}: give a finite number, 0 or more.")
    options = {**OPTIONS[kind], **{key: value for key, value in cfg.items() if key != "type"}}
    if kind == "StepLR" and options["step_size"] < 1:
        raise ConfigError("process.lr_schedule.step_size=0: give the number of epochs between steps, 1 or more.")
    return options
