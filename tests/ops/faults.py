"""Planted faults: whether the checks notice when a kernel is wrong.

    python -m tests.ops.faults [NAME ...]

Each fault is a change of the text of a source in ops/src. The changed kernels are compiled for the CPU, and a child
process compares them with the definition; the fault is caught if an error is over its bound or the process ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ops.library import has_kernel
from tests.ops import support
from tests.ops.emulation import build

KERNELS, SAMPLES, BINDING = "cuda_kernels.cu", "cuda_samples.h", "cuda.cpp"
FAULTS: dict[str, tuple[str, str, str]] = {
    # name: (file, text, text in its place)
    "wrong stride of rows": (
        SAMPLES,
        "entry<Halved>(own.corners, a.value_l)",
        "entry<Halved>(own.corners, a.channels)",
    ),
    "gradient of value not zeroed": (
        BINDING,
        "at::zeros(call.value.sizes(), work)",
        "at::empty(call.value.sizes(), work)",
    ),
    "mask too narrow": (SAMPLES, "__ballot_sync(all_lanes, own", "__ballot_sync(0xffffu, own"),
    "atomic dropped": (KERNELS, "if (sample.weight[c] != T(0)) add", "if (sample.weight[c] != T(0) && c < 3) add"),
    "atomic adds the wrong channel": (SAMPLES, "what[v + 3]))", "what[v + 2]))"),
    "no barrier after the table is filled": (SAMPLES, "a.value_l);\n  __syncwarp();", "a.value_l);"),
    "no barrier before the dot products are read": (KERNELS, "      __syncwarp();\n      T dot[4];", "      T dot[4];"),
    "border of a level off by one": (SAMPLES, "has_second = second < size;", "has_second = second <= size;"),
    "samples two pixels outside taken as inside": (SAMPLES, "x > T(-1) &&", "x > T(-2) &&"),
    "groups beyond the last query add too": (SAMPLES, "live = q < a.queries;", "live = true;"),
    "softmax without its maximum": (SAMPLES, "sum += exp(pair.weights[k] - high);", "sum += exp(pair.weights[k]);"),
    "softmax backward without the mean": (KERNELS, "(grad_weights[k] - mean)", "grad_weights[k]"),
    "reference points of the first frame": (
        SAMPLES,
        "(const T*)p.reference + n * p.reference_n",
        "(const T*)p.reference",
    ),
    "alignment of pointers not checked": (KERNELS, "uintptr_t(pointer) % 16 == 0", "true"),
    "alignment of frames not checked": (KERNELS, "a % vec == 0 && b % vec", "b % vec"),
    "channels beyond a warp's reach left out": (KERNELS, "first += Group * Vec", "first += channels"),
    "dot products exchanged": (KERNELS, "upper ? part[2 + i] : part[i];", "upper ? part[i] : part[2 + i];"),
    "sum over half of the group": (
        SAMPLES,
        "int step = Group / 2; step > 0; step /= 2) value",
        "int step = Group / 4; step > 0; step /= 2) value",
    ),
    "absent corner counted twice": (
        SAMPLES,
        "weight[0] = Halved ? weight[1] *= T(0.5)",
        "weight[0] = Halved ? weight[1]",
    ),
    "gradient of an absent corner": (KERNELS, "own.corners.inside && own.corners.has(c) ?", "own.corners.inside ?"),
    "dot products of another sample": (KERNELS, "dots[own.slot][c]", "dots[at.lane][c]"),
    "level of the sample before": (SAMPLES, "__umulhi(sample + 1, a.per_level)", "__umulhi(sample, a.per_level)"),
    "ordered: last row of a tile left out": (KERNELS, "row < unsigned(rows)", "row + 1 < unsigned(rows)"),
    "ordered: a query left out": (KERNELS, "first += per_pass)", "first += per_pass + 1)"),
    "ordered: sums not zeroed": (KERNELS, "sums[row * warp] = 0;", ";"),
}
SANITIZED = {
    "shared memory of a launch too small": (KERNELS, "table + dots, stream", "table, stream"),
    "one level too many": (SAMPLES, "__umulhi(sample + 1, a.per_level)", "__umulhi(sample + 1, a.per_level) + 16"),
}
"""Faults that only the variant with sanitizers must notice: accesses outside of an array."""
CHEAP = ("wrong stride of rows", "mask too narrow", "atomic dropped")
"""Faults planted in every run of the tests; the others where MODAT_SLOW is set."""

LEVELS = ((7, 5), (4, 3), (2, 2))


def changed(name: str) -> dict[str, str]:
    """Text by file name of the source that the fault changes.

    Raises:
        ValueError: the text to change is not there, or not unique.
    """
    file, old, new = (FAULTS | SANITIZED)[name]
    text = (build.SOURCES / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"fault {name!r}: {file} holds {old!r} {text.count(old)} times instead of once")
    return {file: text.replace(old, new)}


def checks() -> Iterator[dict[str, float]]:
    """Relative errors over the bound, from cases that together pass through every line of the kernels."""
    cases = [
        (dict(queries=9, heads=8, channels=32, points=4), torch.float32),
        (dict(queries=37, heads=1, channels=7, points=3), torch.float32),
        (dict(queries=5, heads=2, channels=136, points=2), torch.float32),
        (dict(queries=9, heads=2, channels=40, points=19), torch.bfloat16),
        (dict(queries=9, heads=2, channels=12, points=4), torch.float64),
    ]
    for form in support.FORMS:
        for sizes, dtype in cases:
            data = support.draw(LEVELS, **sizes)
            for change in (lambda t: t, support.among_nan, support.frames_apart):
                yield _over_bound(support.errors(data, LEVELS, dtype, "cpu", form, change), dtype)
            with support.deterministic():
                yield _over_bound(support.errors(data, LEVELS, dtype, "cpu", form), dtype)
    data = support.draw(LEVELS, channels=8)
    for name in ("locations", "offsets"):
        data[name][:, ::2] = float("nan")
    for kernel, _, names in support.FORMS.values():
        inputs = [data[name].float() for name in ("value", *names)]
        out = kernel(inputs[0], LEVELS, *inputs[1:], backend="cpu")
        yield {"samples at NaN": 2.0 * bool(out[:, ::2].any())}


def _over_bound(errors: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    return {name: error / support.BOUND[dtype] for name, error in errors.items()}


def caught(name: str, variant: str = "sm_90") -> str:
    """How the checks notice the fault; empty if they do not."""
    return noticed(build.library(variant, changed(name)))


def noticed(library: Path) -> str:
    """What the checks find wrong with compiled kernels, in a child process; empty if nothing."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os.write(write, _first_problem(build.Emulation(library)).encode()[:1000])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    return said or (f"the process ended with status {status}" if status else "")


def _first_problem(emulation: build.Emulation) -> str:
    torch.set_num_threads(1)
    with emulation.active():
        try:
            for errors in checks():
                if max(errors.values()) > 1:
                    return f"error of {max(errors.values()):.1e} bounds"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def main() -> int:
    """Print how each fault is noticed; the variant is that of MODAT_EMULATION."""
    torch.set_num_threads(1)
    has_kernel("cpu")
    variant = os.environ.get("MODAT_EMULATION", "sm_90")
    missed = 0
    for name in sys.argv[1:] or FAULTS:
        how = caught(name, variant)
        missed += not how
        print(f"{name}: {how or 'MISSED'}", flush=True)
    without = noticed(build.library(variant))
    print(f"without a fault: {without or 'nothing noticed'}")
    return missed + bool(without)


if __name__ == "__main__":
    sys.exit(main())
