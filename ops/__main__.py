"""`python -m ops`: available backends, their errors against the definition in float64, and their times.

`python -m ops --build` only builds, and exits with 1 if the kernel for the CPU (or, with a CUDA device, for CUDA) is
unavailable.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ops import build
from ops.functional import Backend, ms_deform_attn_fused
from ops.library import has_kernel

SHAPES = ((28, 28), (14, 14), (7, 7))
BOUND = 1e-5


def main() -> int:
    """Print the report; 1 if a backend disagrees with the definition, or with --build if one is missing."""
    parser = argparse.ArgumentParser(prog="python -m ops", description=__doc__.splitlines()[0])
    parser.add_argument("--build", action="store_true", help="build and exit")
    only_build = parser.parse_args().build
    missing = False
    devices: list[tuple[Backend, str]] = [("torch", "cpu")]
    for device in ("cpu", "cuda"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the reason is printed below
            found = has_kernel(device)
        status = build.load("cpu" if device == "cpu" else "cuda")
        print(f"{device:5} {_found(device, status) if found else f'no: {status.reason}'}")
        missing |= not found and (device == "cpu" or torch.cuda.is_available())
        if torch.device(device).type == "cuda" and torch.cuda.is_available():
            devices.append(("torch", device))
        if found:
            devices.append(("cpu" if device == "cpu" else "cuda", device))
    print("torch yes: plain PyTorch, the definition")
    if only_build:
        return int(missing)
    print(f"\n5 frames, levels {SHAPES}, 8 heads of 32 channels, 4 points, float32, {torch.get_num_threads()} threads")
    print(f"{'backend':8}{'device':8}{'error':>9}{'gradients':>11}{'forward ms':>12}{'with backward':>15}")
    wrong = False
    for backend, device in devices:
        error, gradients = _errors(backend, device)
        forward, both = _times(backend, device)
        wrong |= not (error < BOUND and gradients < BOUND)
        print(f"{backend:8}{device:8}{error:9.1e}{gradients:11.1e}{forward:12.2f}{both:15.2f}")
    if wrong:
        print(f"error: a backend differs from the definition in float64 by more than {BOUND}", file=sys.stderr)
    return int(wrong)


def _found(device: str, status: build.Status) -> str:
    what = f"{torch.ops.modat.cpu_capability()} instructions" if device == "cpu" else torch.cuda.get_device_name()
    return f"yes: {what}, {status.path}"


def _inputs(frames: int, device: str) -> list[Tensor]:
    """Seeded value, reference points, offsets and logits.

    No sample is near a pixel centre, where the gradient of the location is discontinuous and would depend on rounding.
    """
    draw = torch.Generator().manual_seed(0)
    rows = sum(height * width for height, width in SHAPES)
    value = torch.randn(frames, rows, 8, 32, generator=draw)
    reference = torch.randint(0, 29, (rows, 2), generator=draw) / 28  # at quarters of a pixel on each level
    whole = (2 * torch.randn(frames, rows, 8, 3, 4, 2, generator=draw)).round()
    offsets = whole + 0.05 + 0.15 * torch.rand(whole.shape, generator=draw)
    logits = torch.randn(frames, rows, 8, 3, 4, generator=draw)
    return [tensor.to(device) for tensor in (value, reference, offsets, logits)]


def _run(tensors: list[Tensor], backend: Backend, backward: bool) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_(backward and index != 1) for index, tensor in enumerate(tensors)]
    value, reference, offsets, logits = leaves
    out = ms_deform_attn_fused(value, SHAPES, reference, offsets, logits, backend=backend)
    if backward:
        out.backward(torch.ones_like(out))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _errors(backend: Backend, device: str) -> tuple[float, float]:
    """Relative errors of the output and of the worst gradient on one frame, against float64."""
    got = _run(_inputs(1, device), backend, backward=True)
    true = _run([tensor.double() for tensor in _inputs(1, "cpu")], "torch", backward=True)
    errors = [float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(got, true, strict=True)]
    return errors[0], max(errors[1:])


def _times(backend: Backend, device: str) -> tuple[float, float]:
    tensors = _inputs(5, device)
    return (
        _median_ms(lambda: _run(tensors, backend, backward=False), device),
        _median_ms(lambda: _run(tensors, backend, backward=True), device),
    )


def _median_ms(call: Callable[[], object], device: str, repeats: int = 5) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
