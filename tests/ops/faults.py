"""Planted faults: whether the checks notice when a kernel is wrong.

    python -m tests.ops.faults [NAME ...]

Each fault is a change of the text of a source in ops/src. The changed kernels are compiled for the CPU, and a child
process compares them with the definition; the fault is caught if an error is over its bound or the process ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import torch

from ops.library import has_kernel
from tests.ops import support
from tests.ops.emulation import build

KERNELS, MAPPING, BINDING = "cuda_kernels.cu", "cuda_mapping.h", "cuda.cpp"
FAULTS: dict[str, tuple[str, str, str]] = {
    # name: (file, text, text in its place)
    "shuffle mask of the whole warp in a group that has ended": (
        MAPPING,
        "return ones << (thread % 32 / group * group);",
        "return 0xffffffffu;",
    ),
    "shuffle mask of the first group": (MAPPING, "return ones << (thread % 32 / group * group);", "return ones;"),
    "gradient of value not zeroed": (BINDING, "at::zeros(sizes,", "at::empty(sizes,"),
    "border of a level off by one": (KERNELS, "first < 0 || first >= size ?", "first < 0 || first > size ?"),
}
CHEAP = ("shuffle mask of the first group", "gradient of value not zeroed", "border of a level off by one")
"""Faults planted in every run of the tests; the others where MODAT_SLOW is set."""

LEVELS = ((7, 5), (4, 3), (2, 2))


def changed(name: str) -> dict[str, str]:
    """Text by file name of the source that the fault changes.

    Raises:
        ValueError: the text to change is not there, or not unique.
    """
    file, old, new = FAULTS[name]
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
            for change in (lambda t: t, support.among_nan):
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
    return _child(build.library(variant, changed(name)))


def _child(library: os.PathLike[str]) -> str:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os.write(write, _first_problem(build.Emulation(build.Path(library))).encode()[:1000])
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
    """Print how each fault is noticed."""
    torch.set_num_threads(1)
    has_kernel("cpu")
    missed = 0
    for name in sys.argv[1:] or FAULTS:
        how = caught(name)
        missed += not how
        print(f"{name}: {how or 'MISSED'}", flush=True)
    print(f"without a fault: {_child(build.library()) or 'nothing noticed'}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
