"""Devices and processes of a run: Lightning Fabric as the config and the launcher's environment describe it."""

import atexit
import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy, Strategy
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecision

from model.precision import check_precision
from utils.cpu import resolve_precision
from utils.errors import ConfigError
from utils.runtime import warn

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
"""`process.precision` -> Fabric's name."""
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def build_fabric(process: Mapping[str, Any]) -> Fabric:
    """Fabric for `cfg.process`, not launched yet.

    Raises:
        ConfigError: the machine lacks what is asked for.
    """
    if process["strategy"] == "fsdp" and process["clip_grad_norm"] is not None:
        raise ConfigError("process.strategy='fsdp' cannot limit the gradient's norm: set process.clip_grad_norm=None.")
    kind = accelerator()
    check_precision(process["precision"], "cuda" if kind == "gpu" else "cpu")
    devices, num_nodes = processes(process, kind)
    try:
        return Fabric(
            accelerator=kind,
            devices=devices,
            num_nodes=num_nodes,
            strategy=build_strategy(str(process["strategy"]), kind, devices * num_nodes),
            precision=PRECISIONS[process["precision"]],  # type: ignore[arg-type]
        )
    except (ValueError, RuntimeError) as error:  # RuntimeError: what SLURM's variables lack
        wanted = ", ".join(f"process.{key}={process[key]!r}" for key in ("strategy", "devices", "num_nodes"))
        raise ConfigError(f"{wanted} cannot be had on this machine: {error}") from error


def launch(fabric: Fabric) -> None:
    """Start the other processes and connect to them, until this process exits.

    At the exit, Fabric disconnects for NCCL only. Gloo's threads would live into the end of the interpreter, where
    "terminate called without an active exception" can abort a finished run.
    """
    fabric.launch()
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        atexit.register(torch.distributed.destroy_process_group)


def accelerator() -> str:
    """'gpu' where PyTorch finds one, else 'cpu'."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def processes(process: Mapping[str, Any], accelerator: str) -> tuple[int, int]:
    """Processes per machine and number of machines: torchrun's or SLURM's where one of them started this process."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        return int(environment["LOCAL_WORLD_SIZE"]), int(environment["GROUP_WORLD_SIZE"])
    if SLURMEnvironment.detect():
        nodes = int(environment.get("SLURM_NNODES", 1))
        return int(environment["SLURM_NTASKS"]) // nodes, nodes
    devices = process["devices"]
    if isinstance(devices, Mapping):
        devices = devices.get(accelerator, "auto")
    if devices == "auto":
        devices = torch.cuda.device_count() if accelerator == "gpu" else 1
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ConfigError(
            f"process.devices={devices!r}: give 'auto', a number of processes per machine from 1 up, or "
            "a dictionary with one of them for 'cpu' and 'gpu'."
        )
    return devices, int(process["num_nodes"])


def run_precision(process: Mapping[str, Any], earlier: str | None) -> str:
    """What `process.precision` means on this machine.

    Args:
        process: of the config.
        earlier: precision of the run that goes on: it keeps what 'auto' meant when it began. None starts anew.
    """
    precision, kind = str(process["precision"]), accelerator()
    if precision == "auto" and earlier is not None:
        return earlier
    if precision == "auto" and kind == "cpu" and math.prod(processes(process, kind)) > 1:
        return "32"  # processes that measure by themselves could disagree
    return resolve_precision(precision, torch.device("cuda" if kind == "gpu" else "cpu"), warn)


def share_cores(fabric: Fabric, local_processes: int) -> None:
    """Limit the threads of a process on a CPU to its share of the cores; threads beyond it slow all processes down."""
    if fabric.device.type == "cpu" and local_processes > 1:
        share = max(1, len(os.sched_getaffinity(0)) // local_processes)
        torch.set_num_threads(min(torch.get_num_threads(), share))


def build_strategy(name: str, accelerator: str, world_size: int) -> str | Strategy:
    """How processes share the work: 'ddp' (also by 'auto') or 'fsdp'; other names are Fabric's."""
    if name in ("auto", "ddp"):
        if world_size == 1:
            return "auto"
        return DDPStrategy(
            process_group_backend="nccl" if accelerator == "gpu" else "gloo",
            # Exchanging buffers in each forward pass would hang where processes have different numbers of validation
            # batches; SyncBatchNorm keeps its statistics equal by itself.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    if name == "fsdp":
        # Autocast alone lowers the precision, as elsewhere: router, norms and frames stay in float32.
        return FSDPStrategy(state_dict_type="full", mixed_precision=MixedPrecision())
    return name


def all_reduce(value: Tensor, operation: str, fabric: Fabric) -> Tensor:
    """A tensor reduced over all processes by 'SUM', 'MAX' or 'MIN', in place; unchanged where there is one process."""
    if fabric.world_size > 1:
        value = value.to(fabric.device)
        torch.distributed.all_reduce(value, getattr(torch.distributed.ReduceOp, operation))
    return value


class OnHost:
    """Values on their way from a device to the host: the copy runs beside the work that is queued after it.

    Args:
        values: of any shape; on a CPU they are kept as they are.
    """

    def __init__(self, values: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            # Pinned: a copy to other memory would wait for all that is queued.
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._values = values

    def read(self) -> Any:
        """The values as (nested lists of) numbers; waits for the copy alone."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


@contextlib.contextmanager
def ends_with_this_process(fabric: Fabric, everywhere: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Where the block raises, the processes that Fabric has started from this one end when it does.

    They would wait for it in a collective operation, on GPUs until the timeout of NCCL. (Fabric ends all when one of
    the others fails, torchrun and srun when any does.)

    Args:
        fabric: launched within the block or before.
        everywhere: errors that all processes raise together, and end by.
    """
    try:
        yield
    except everywhere:
        raise
    except Exception:
        atexit.register(_kill_started, fabric)  # at the exit: the message comes first
        raise


def _kill_started(fabric: Fabric) -> None:
    for process in getattr(fabric.strategy.launcher, "procs", ()):
        if process.poll() is None:
            process.kill()


def full_weights(fabric: Fabric, model: _FabricModule) -> dict[str, Any]:
    """The model's weights by name, complete on the first process whatever the strategy; called on all processes."""
    if isinstance(fabric.strategy, FSDPStrategy):
        return dict(get_model_state_dict(model.module, options=FULL))
    weights: dict[str, Any] = model.module.state_dict()
    return weights


def full_states(fabric: Fabric, model: _FabricModule, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and optimizer state, complete on the first process whatever the strategy; called on all processes.

    Args:
        fabric: launched.
        model: from `fabric.setup_module`.
        optimizer: from `fabric.setup_optimizers`.
    """
    if isinstance(fabric.strategy, FSDPStrategy):
        weights, state = get_state_dict(model.module, optimizer.optimizer, options=FULL)
        return dict(weights), dict(state)
    return model.module.state_dict(), optimizer.state_dict()


def load_optimizer(fabric: Fabric, model: _FabricModule, optimizer: Any, checkpoint: Mapping[str, Any]) -> None:
    """The optimizer state of a checkpoint, as `full_states` gave it."""
    state = checkpoint["optimizer"]
    if isinstance(fabric.strategy, FSDPStrategy):
        set_optimizer_state_dict(model.module, optimizer.optimizer, optim_state_dict=state, options=FULL)
    else:
        optimizer.load_state_dict(state)
