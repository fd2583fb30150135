"""Several processes against one that takes their batches in turn: gradients, weights after some steps, time per step.

python -m scripts.gpu_day.processes --backend gloo --device cuda --json FILE   # two processes on one card
python -m scripts.gpu_day.processes --backend nccl --device cuda --json FILE   # one per card
"""

import argparse
import json
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.criterion import build_criterion
from scripts.benchmark import tasks

FRAMES, STEPS = 4, 5  # frames per process; steps that are timed
BOUND = 1e-3
"""Largest relative error of the gradients in float32: sums are in another order, and the router sees each of them."""


def gradients(model: nn.Module, criterion: nn.Module, batch: tuple[Tensor, ...]) -> float:
    """Forward and backward on (log-mels, frames, masks); returns the loss."""
    log_mel, frames, masks = batch
    flag = torch.ones(len(frames), device=frames.device)
    losses = criterion(model(log_mel, frames), masks, flag)
    losses["total"].backward()
    return float(losses["total"].detach())


def work(rank: int, options: argparse.Namespace, port: int) -> None:
    """One of the processes; the first writes the results.

    Raises:
        RuntimeError: gradients differ from those of one process, or weights between processes.
    """
    world = options.processes
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group(options.backend, rank=rank, world_size=world)
    try:
        with tasks.precision("32", device):
            found = compare(rank, world, options, device)
        if rank == 0:
            print(json.dumps(found, indent=1))
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        if not (found["relative error of the gradients"] < BOUND and found["weights equal on all processes"]):
            raise RuntimeError(f"{world} processes ({options.backend}) do not compute what one does: {found}")
    finally:
        dist.destroy_process_group()


def compare(rank: int, world: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Results of all processes, the same on each of them."""
    request = {
        "config": options.config, "weights": None, "device": str(device), "threads": 1, "size": options.size,
        "frames": FRAMES * world, "formulation": "ours",
    }  # fmt: skip
    model = tasks.prepare(request)  # in evaluation mode, where no dropout draws and no statistics move
    criterion = build_criterion({}, tasks.num_classes(model)).train()
    log_mel, frames = tasks.batch(request)
    draw = torch.Generator().manual_seed(tasks.SEED)
    masks = torch.randint(0, 2, (len(frames), options.size, options.size), generator=draw, dtype=torch.uint8).to(device)
    share = slice(rank * FRAMES, (rank + 1) * FRAMES)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    alone_loss = 0.0
    for other in range(world):  # what the processes share out, by this one alone
        part = slice(other * FRAMES, (other + 1) * FRAMES)
        alone_loss += gradients(model, criterion, (log_mel[part], frames[part], masks[part])) / world
    alone = [parameter.grad / world for parameter in parameters if parameter.grad is not None]
    model.zero_grad()
    wrapped = DistributedDataParallel(model)
    gradients(wrapped, criterion, (log_mel[share], frames[share], masks[share]))
    together = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in alone]).norm()
    error = torch.stack([(a - b).norm() for a, b in zip(together, alone, strict=True)]).norm() / norm

    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    seconds = []
    for _ in range(STEPS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        optimizer.zero_grad()
        gradients(wrapped, criterion, (log_mel[share], frames[share], masks[share]))
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    weights = torch.stack([parameter.detach().double().sum() for parameter in parameters])
    least, most = weights.clone(), weights.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    largest = error.double()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return {
        "processes": world,
        "backend": options.backend,
        "devices": 1 if options.device == "cpu" else min(world, torch.cuda.device_count()),
        "frames per process": FRAMES,
        "relative error of the gradients": float(largest),
        "weights equal on all processes": bool(torch.equal(least, most)),
        "mean loss": alone_loss,
        "milliseconds per step": 1e3 * statistics.median(seconds[1:]),
    }


def main() -> None:
    """Start the processes and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config/ms3/MoDAT_pvt2_ms3.py")
    parser.add_argument("--backend", choices=("gloo", "nccl"), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (options, port), nprocs=options.processes)


if __name__ == "__main__":
    main()
