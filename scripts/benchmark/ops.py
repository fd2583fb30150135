"""Times of the deformable attention op, as ratios taken in one process.

    python -m scripts.benchmark.ops                       # both sizes, 1 and 2 threads
    python -m scripts.benchmark.ops --levels 28 14 7 --threads 2 --repeats 20 --json ops.json

Rows: the definition in plain PyTorch; ours on locations and weights, and fused (from offsets and logits); if
torch-ms-deform-attn is installed (optional, `pip install torch-ms-deform-attn`), that op, alone and after softmax and
locations in PyTorch. Rounds alternate between the rows and medians are reported, so other load on the machine affects
all rows alike.

The definition allocates large temporaries, which glibc returns to the system after each call. It is therefore reported
twice: with default settings, and ("kept") from a second process with memory kept, as in train.sh; ours is timed there
too.

On a CUDA device (the default if there is one): 10 and 100 frames, float32 and bfloat16, with the classic algorithm of
one thread per channel (classic_msda.cu, float32) for comparison, and the share of the memory limit: the time to read
every input and write every output once at the rate of a large copy measured in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops import MSDeformAttn, build, ms_deform_attn, ms_deform_attn_fused
from ops.library import has_kernel
from ops.reference import ms_deform_attn_fused_torch, ms_deform_attn_torch, sampling_locations
from scripts.benchmark.allocator import memory_kept

CUDA_CALLS = 20  # between two events
LAUNCH_CYCLES = 50_000_000  # about 30 ms of GPU time, more than CUDA_CALLS launches take

HEADS, CHANNELS, POINTS = 8, 32, 4


@dataclass
class Row:
    """Medians of one implementation; milliseconds and MB beyond the inputs."""

    name: str
    levels: str
    frames: int
    threads: int
    dtype: str
    forward_ms: float
    both_ms: float
    forward_mb: float | None = None
    both_mb: float | None = None
    share_of_memory_limit: tuple[float, float] | None = None


class Workload:
    """An encoder's call: each pixel of each level is a query, with offsets as at initialisation."""

    def __init__(self, levels: list[int], frames: int, device: str, dtype: torch.dtype) -> None:
        self.shapes = tuple((size, size) for size in levels)
        self.frames, self.device = frames, device
        draw = torch.Generator().manual_seed(0)
        rows = sum(size * size for size in levels)
        centres = [torch.cartesian_prod(*[(torch.arange(size) + 0.5) / size] * 2).flip(-1) for size in levels]
        samples = (frames, rows, HEADS, len(levels), POINTS)
        ring = MSDeformAttn(HEADS * CHANNELS, len(levels), HEADS, POINTS).sampling_offsets.bias.detach()
        offsets = ring.view((*samples[2:], 2)) + torch.randn((*samples, 2), generator=draw)
        self.reference = torch.cat(centres).to(device)  # (Q, 2)
        self.offsets = offsets.to(device)
        self.logits = torch.randn(samples, generator=draw).to(device)
        self.value = torch.randn(frames, rows, HEADS, CHANNELS, generator=draw).to(device, dtype)
        self.locations, self.weights = self.prologue(self.offsets, self.logits)
        self.grad = torch.randn(frames, rows, HEADS * CHANNELS, generator=draw).to(device, dtype)

    def prologue(self, offsets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Locations and weights in eager PyTorch."""
        weights = logits.flatten(-2).softmax(-1).view_as(logits)
        return sampling_locations(self.reference[None, :, None], offsets, self.shapes), weights

    def implementations(self) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
        """Name -> function and its differentiable inputs."""
        plain = (self.value, self.locations, self.weights)
        raw = (self.value, self.offsets, self.logits)
        points = self.reference[None, :, None]
        known: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
            "definition": (lambda v, p, w: ms_deform_attn_torch(v, self.shapes, p, w), plain),
            "definition, softmax and locations": (
                lambda v, o, w: ms_deform_attn_fused_torch(v, self.shapes, points.to(o), o, w),
                raw,
            ),
        }
        if has_kernel(self.device):
            known["ours"] = (lambda v, p, w: ms_deform_attn(v, self.shapes, p, w), plain)
            known["ours, fused"] = (lambda v, o, w: ms_deform_attn_fused(v, self.shapes, self.reference, o, w), raw)
        peer = _peer() if self.value.dtype == torch.float32 else None
        if peer is not None:
            sizes = torch.tensor(self.shapes, device=self.device)
            starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
            known["torch-ms-deform-attn"] = (lambda v, p, w: peer(v, sizes, starts, p, w), plain)
            known["torch-ms-deform-attn, softmax and locations"] = (
                lambda v, o, w: peer(v, sizes, starts, *self.prologue(o, w)),
                raw,
            )
        if self.device == "cuda" and self.value.dtype == torch.float32:
            known["classic CUDA"] = (Classic(self.shapes), plain)
        return known

    def bytes(self, backward: bool) -> int:
        """Bytes to read and write: inputs and output, in the backward pass also gradients."""
        inputs = sum(tensor.nbytes for tensor in (self.value, self.locations, self.weights))
        return (2 * inputs if backward else inputs) + self.grad.nbytes


def _peer() -> Callable[..., Tensor] | None:
    try:
        return importlib.import_module("torch_ms_deform_attn").ms_deform_attn
    except ImportError:
        return None


class Classic:
    """scripts/benchmark/classic_msda.cu as a differentiable function."""

    library: Any = None

    def __init__(self, shapes: tuple[tuple[int, int], ...]) -> None:
        if Classic.library is None:
            target = Path(tempfile.mkdtemp()) / "classic.so"
            major, minor = torch.cuda.get_device_capability()
            flags = ["-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC"]
            subprocess.run(
                [build.nvcc(), *flags, str(Path(__file__).with_name("classic_msda.cu")), "-o", str(target)], check=True
            )
            Classic.library = ctypes.CDLL(str(target))
        self.shapes = torch.tensor(shapes, device="cuda")
        self.starts = torch.cat((self.shapes.new_zeros(1), self.shapes.prod(1).cumsum(0)[:-1]))

    def __call__(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        """(N, Q, M * D)."""
        return _ClassicFunction.apply(value, locations, weights, self)

    def call(self, name: str, value: Tensor, locations: Tensor, *tensors: Tensor) -> None:
        """Run a kernel on contiguous float32 tensors."""
        sizes = (*value.shape, locations.shape[1], *locations.shape[3:5])
        pointers = (self.shapes, self.starts, value, locations, *tensors)
        code = getattr(Classic.library, name)(
            (ctypes.c_int * 7)(*sizes),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in pointers),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if code:
            raise RuntimeError(f"{name}: CUDA error {code}")


class _ClassicFunction(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor, locations: Tensor, weights: Tensor, classic: Classic) -> Tensor:
        context.save_for_backward(value, locations, weights)
        context.classic = classic
        out = value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
        classic.call("classic_forward", value, locations, weights, out)
        return out

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights = context.saved_tensors
        out = torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights)
        context.classic.call("classic_backward", value, locations, weights, grads[0].contiguous(), *out)
        return (*out, None)


def _both(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> None:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    function(*leaves).backward(grad)


def _seconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        torch.cuda._sleep(LAUNCH_CYCLES)  # the calls queue up behind it: kernels are timed, not their launches
        start.record()
        for _ in range(CUDA_CALLS):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / CUDA_CALLS
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _extra_mb(call: Callable[[], object], device: str) -> float | None:
    """Peak memory of a call beyond the memory before it; None if the system does not report it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status_kb("VmRSS")
        call()
        return (_status_kb("VmHWM") - before) / 1e3
    except (OSError, AttributeError):
        return None


def _status_kb(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(
    levels: list[int], frames: int, threads: int, repeats: int, device: str, dtype: torch.dtype, only: str = ""
) -> list[Row]:
    """Rows of one size; `only` selects implementations by comma-separated prefixes of their names."""
    torch.set_num_threads(threads)
    work = Workload(levels, frames, device, dtype)
    known = {
        name: entry
        for name, entry in work.implementations().items()
        if not only or any(name.startswith(word) for word in only.split(","))
    }
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        name: (partial(function, *inputs), partial(_both, function, inputs, work.grad))
        for name, (function, inputs) in known.items()
    }
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for turn in range(repeats + 1):
        for name, pair in calls.items():
            for call, seen in zip(pair, times[name], strict=True):
                seconds = _seconds(call, device)
                if turn:  # the first round warms up
                    seen.append(1e3 * seconds)
    limit = _copy_rate(device) if device == "cuda" else None
    rows = []
    for name, (forward, both) in times.items():
        row = Row(name, "/".join(map(str, levels)), frames, threads, str(dtype).removeprefix("torch."), 0, 0)
        row.forward_ms, row.both_ms = statistics.median(forward), statistics.median(both)
        row.forward_mb, row.both_mb = (_extra_mb(call, device) for call in calls[name])
        if limit is not None:
            floor = [work.bytes(False) / limit * 1e3, (work.bytes(False) + work.bytes(True)) / limit * 1e3]
            row.share_of_memory_limit = floor[0] / row.forward_ms, floor[1] / row.both_ms
        rows.append(row)
    return rows


def _copy_rate(device: str) -> float:
    """Bytes per second, read and written, of a 1 GB copy."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(_seconds(lambda: target.copy_(source), device) for _ in range(10))


def table(rows: list[Row]) -> None:
    """Print the rows of one size with the ratios to the definition and to the peer."""
    named = {row.name: row for row in rows}
    first = rows[0]
    print(f"\nlevels {first.levels}, {first.frames} frames, {first.dtype}, {first.threads} threads; ms (times faster)")
    print(f"{'':45}{'forward':>9}{'with backward':>15}{'of definition':>16}{'of peer':>14}{'extra MB':>12}")
    for row in rows:
        raw = "fused" in row.name or "softmax" in row.name
        suffix = ", softmax and locations" if raw else ""
        kept = ", kept" if row.name.endswith(", kept") else ""
        ratios = [_ratio(named.get(f"{name}{suffix}{kept}"), row) for name in ("definition", "torch-ms-deform-attn")]
        memory = "" if row.forward_mb is None else f"{row.forward_mb:.0f} / {row.both_mb:.0f}"
        share = row.share_of_memory_limit
        limit = "" if share is None else f"  {share[0]:.0%} / {share[1]:.0%} of the memory limit"
        times = f"{row.forward_ms:9.2f}{row.both_ms:15.2f}"
        print(f"{row.name:45}{times}{ratios[0]:>16}{ratios[1]:>14}{memory:>12}{limit}")


def _ratio(slow: Row | None, row: Row) -> str:
    return "" if slow is None else f"{slow.forward_ms / row.forward_ms:.1f} / {slow.both_ms / row.both_ms:.1f}"


def _kept(levels: list[int], frames: int, threads: int, repeats: int) -> list[Row]:
    """The definition and ours, from a process with memory kept."""
    sizes = ["--levels", *map(str, levels), "--frames", str(frames), "--threads", str(threads)]
    arguments = [*sizes, "--repeats", str(repeats), "--rows-only", "definition,ours"]
    command = [sys.executable, "-m", "scripts.benchmark.ops", *arguments]
    result = subprocess.run(command, env=memory_kept(), stdout=subprocess.PIPE, text=True, check=True)
    rows = [Row(**row) for row in json.loads(result.stdout)]
    for row in rows:
        row.name += ", kept"
        row.forward_mb = row.both_mb = None  # kept memory does not reflect the call
    return rows


def main() -> None:
    """Print the tables; write them with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--levels", type=int, nargs="+", help="sides of the square levels; default 28 14 7, 64 32 16")
    parser.add_argument("--frames", type=int, nargs="+", help="default 10; on a GPU 10 100")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7, help="rounds after the warm-up")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--rows-only", metavar="NAMES", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = [args.levels] if args.levels else [[28, 14, 7], [64, 32, 16]]
    cuda = args.device == "cuda"
    rows: list[Row] = []
    for levels in sizes:
        for frames in args.frames or ([10, 100] if cuda else [10]):
            for threads in args.threads[:1] if cuda else args.threads:
                for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
                    only = args.rows_only or ""
                    new = measure(levels, frames, threads, args.repeats, args.device, dtype, only)
                    if not cuda and not only:
                        new += _kept(levels, frames, threads, args.repeats)
                    rows += new
                    if not only:
                        table(new)
    if args.rows_only:
        print(json.dumps([asdict(row) for row in rows]))
    elif args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
