"""What a run computes on: Lightning's Trainer as the config and the launcher's environment describe it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.fsdp import MixedPrecision

from model.precision import check_precision
from scripts.engine.resume import AtomicCheckpointIO
from utils.errors import ConfigError

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
"""`process.precision` -> Lightning's name."""


def build_trainer(process: Mapping[str, Any], folder: Path, callbacks: list[Callback]) -> Trainer:
    """Lightning's Trainer as `cfg.process` and the launcher's environment describe it.

    Raises:
        ConfigError: the machine lacks what is asked for.
    """
    if process["strategy"] == "fsdp" and process["clip_grad_norm"] is not None:
        raise ConfigError("process.strategy='fsdp' cannot limit the gradient's norm: set process.clip_grad_norm=None.")
    kind = accelerator()
    check_precision(process["precision"], "cuda" if kind == "gpu" else "cpu")
    devices, num_nodes = processes(process, kind)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect() and "TORCHELASTIC_RUN_ID" not in os.environ:
        # Lightning would write a checkpoint of its own, in a place and a way of its own.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    try:
        return Trainer(
            accelerator=kind,
            devices=devices,
            num_nodes=num_nodes,
            strategy=build_strategy(str(process["strategy"]), kind, devices * num_nodes),
            precision=PRECISIONS[process["precision"]],  # type: ignore[arg-type]
            max_epochs=process["train_epochs"],
            accumulate_grad_batches=process["accumulate"],
            gradient_clip_val=process["clip_grad_norm"],
            sync_batchnorm=bool(process["sync_batchnorm"]) and kind == "gpu" and devices * num_nodes > 1,
            detect_anomaly=process["detect_anomaly"],
            default_root_dir=str(folder),
            callbacks=callbacks,
            plugins=plugins,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
    except (ValueError, MisconfigurationException) as error:
        wanted = ", ".join(f"process.{key}={process[key]!r}" for key in ("strategy", "devices", "num_nodes"))
        raise ConfigError(f"{wanted} cannot be had on this machine: {error}") from error


def accelerator() -> str:
    """Lightning's name of what this machine computes on."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def processes(process: Mapping[str, Any], accelerator: str) -> tuple[int, int]:
    """Processes on this machine and number of machines: torchrun's or SLURM's where one of them started this one."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        return int(environment["LOCAL_WORLD_SIZE"]), int(environment["GROUP_WORLD_SIZE"])
    if SLURMEnvironment.detect():
        nodes = int(environment.get("SLURM_NNODES", 1))
        return int(environment["SLURM_NTASKS"]) // nodes, nodes
    devices = process["devices"]
    if devices == "auto":
        devices = torch.cuda.device_count() if accelerator == "gpu" else 1
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ConfigError(f"process.devices={devices!r}: give 'auto' or a number of processes a machine, 1 or more.")
    return devices, int(process["num_nodes"])


def build_strategy(name: str, accelerator: str, world_size: int) -> str | Strategy:
    """How processes share the work: none alone, else 'ddp' (also by 'auto') or 'fsdp'; other names go to Lightning."""
    if name in ("auto", "ddp"):
        if world_size == 1:
            return "auto"
        return DDPStrategy(
            process_group_backend="nccl" if accelerator == "gpu" else "gloo",
            # Buffers are the same everywhere (for running statistics see AVSTraining.on_after_backward), and exchanging
            # them at each forward would hang where processes have different numbers of validation batches.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    if name == "fsdp":
        # Autocast alone lowers the precision, as elsewhere: the router, norms and pictures stay in float32.
        return FSDPStrategy(state_dict_type="full", mixed_precision=MixedPrecision())
    return name
