"""Choice between float32 and bfloat16 for a device, on CPUs by a measurement of both."""

import functools
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

CPUINFO = Path("/proc/cpuinfo")
BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of /proc/cpuinfo (x86, x86, Arm) of processors that multiply bfloat16 without converting it to float32."""
WORTHWHILE = 1.2
"""'auto' gives up float32's accuracy only for products at least this many times as fast."""
NOISE = 1.05
"""An explicit bf16 is warned about where its products take more than this share of float32's time."""
LAYERS = ((980, 320, 1280), (1500, 256, 256), (784, 2048, 256))
"""Rows, input and output channels of linear layers as in PVTv2-B5, the decoder and the mask head."""


class ProductTimes(NamedTuple):
    """Seconds of the same matrix products in each precision."""

    float32: float
    bf16: float


def resolve_precision(precision: str, device: torch.device, warn: Callable[[str], None] | None = None) -> str:
    """Replace 'auto' by a precision; check that an explicit 'bf16' is worth it.

    On CUDA devices 'auto' is bf16 where the device computes it natively. On CPUs it is bf16 if the processor has
    instructions for bf16 products and these are at least 1.2 times as fast as float32 in a measurement of a quarter
    second. The measurement runs once per process. Processes of one run have to agree: resolve on rank 0 and share.

    Args:
        precision: 'auto', or a value of `process.precision`, returned as it is.
        device: where the model runs.
        warn: receives one message per process if 'bf16' is asked for and slower than float32 on this CPU.

    Returns:
        '32' or 'bf16' for 'auto', else `precision`.
    """
    if precision == "auto":
        return choose_precision(device)
    if precision == "bf16" and device.type == "cpu" and warn is not None:
        message = _slow_bf16()
        if message and not _warned:
            _warned.append(message)
            warn(message)
    return precision


def choose_precision(device: torch.device) -> str:
    """'32' or 'bf16', whichever suits the device; see `resolve_precision`."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    if device.type != "cpu" or not has_bf16_products():
        return "32"
    times = product_times()
    return "bf16" if times.float32 >= WORTHWHILE * times.bf16 else "32"


def has_bf16_products(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the processor multiplies bfloat16 natively; without the file (no Linux) only Arm Macs are assumed to."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.system() == "Darwin" and platform.machine() == "arm64"
    flags = next((line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "feat"))), [])
    return not BF16_FEATURES.isdisjoint(flags)


@functools.cache
def product_times(seconds: float = 0.25) -> ProductTimes:
    """Times of linear layers of the model's sizes in float32 and bfloat16, with the threads of this process.

    The precisions alternate and the shortest time of each layer counts, so other processes on the machine matter
    little.

    Args:
        seconds: duration of the measurement after a warm-up; each product runs at least twice.
    """
    precisions = (torch.float32, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    layers = [
        [
            tuple(torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, inputs), (outputs, inputs)))
            for dtype in precisions
        ]
        for rows, inputs, outputs in LAYERS
    ]
    best = [[float("inf")] * len(precisions) for _ in LAYERS]
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        end, rounds = float("inf"), 0
        while rounds < 3 or time.perf_counter() < end:
            for layer, shortest in zip(layers, best, strict=True):
                for index, (x, weight) in enumerate(layer):
                    start = time.perf_counter()
                    F.linear(x, weight)
                    shortest[index] = min(shortest[index], time.perf_counter() - start)
            if rounds == 0:
                end = time.perf_counter() + seconds
            rounds += 1
    return ProductTimes(*(sum(column) for column in zip(*best, strict=True)))


_warned: list[str] = []


def _slow_bf16() -> str | None:
    times = product_times()
    if times.bf16 <= NOISE * times.float32:
        return None
    return (
        f"process.precision=bf16 is slower than float32 on this CPU: the same matrix products take "
        f"{1e3 * times.bf16:.1f} ms in bf16 and {1e3 * times.float32:.1f} ms in float32. "
        "process.precision=32 is faster and more accurate; 'auto' decides by this measurement."
    )
