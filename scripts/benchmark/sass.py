"""Registers, occupancy and instructions of the CUDA kernels, from the machine code: needs nvcc, but no GPU.

    python -m scripts.benchmark.sass                      # sm_80 and sm_90
    python -m scripts.benchmark.sass --arch 90 --levels 3 --points 4

cuobjdump and nvdisasm come with the CUDA toolkit, or by `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`.

Rows: kernels for heads of 32 channels; ours, and the classic algorithm of classic_msda.cu (float32), with the same
flags. Instructions are those that a warp issues, per sample of one head of one query. Each instruction counts once per
pass of the loops around it; of two alternative branches the longer one counts; other branches are taken to be passed
through, as for samples inside of their level; what only rare paths reach (behind the last EXIT) is left out. Loops are
found by their backward branches, and their passes by what they hold: the loop over samples holds the loads of corners,
the one around it is over rounds of samples (ours) or levels (classic), further ones have one pass. Other loops are the
softmax (ours: one pass per round) and the serial sum of the classic backward pass, unrolled to one pass.

Occupancy is what registers allow. The last columns are lower limits on an H100 (132 multiprocessors at 1.755 GHz,
3.0 TB/s) for 10 frames at levels of 28, 14 and 7 pixels: the time to issue the instructions, and to read each input and
write each output once.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ops import build

HERE = Path(__file__).resolve().parent
OURS = HERE.parents[1] / "ops" / "src" / "cuda_kernels.cu"
CLASSIC = HERE / "classic_msda.cu"
THREADS = {"80": 2048, "90": 2048}  # of a multiprocessor
REGISTERS = 65536
CHANNELS = 32
FRAMES, HEADS, LEVELS, POINTS = 10, 8, (28, 14, 7), 4
SAMPLES = len(LEVELS) * POINTS  # per pair
ISSUED, BANDWIDTH = 132 * 4 * 1.755e9, 3.0e12  # H100: warp instructions and bytes per second


@dataclass
class Kernel:
    """A kernel as compiled; `lanes` is the number of lanes per pair of query and head."""

    name: str
    pattern: str
    block: int
    lanes: int
    value_bytes: int = 4
    classic: bool = False


KERNELS = (
    Kernel("forward, float32", "forward_kernelIffLi4ELi8E", 256, 8),
    Kernel("forward, bfloat16", "forward_kernelIf13__nv_bfloat16Li8ELi4E", 256, 4, 2),
    Kernel("forward, classic", "forward_kernelENS_5Sizes", 1024, 32, classic=True),
    Kernel("backward, float32", "backward_kernelIffLi4ELi8E", 256, 8),
    Kernel("backward, bfloat16", "backward_kernelIf13__nv_bfloat16Li8ELi4E", 256, 4, 2),
    Kernel("backward, classic", "backward_kernelENS_5Sizes", 32, 32, classic=True),
)


def tool(name: str) -> str:
    """Path of cuobjdump: on the PATH, beside nvcc, or from the wheels."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(build.nvcc()).parent))
    if found:
        return found
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob(f"*/bin/{name}")):
            return str(path)
    raise SystemExit(f"error: no {name}; install nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or the CUDA toolkit")


def compile_cubin(source: Path, arch: str, folder: Path) -> tuple[Path, str]:
    """The machine code, and what ptxas reports."""
    target = folder / f"{source.stem}-{arch}.cubin"
    command = [build.nvcc(), "-std=c++17", "-O3", "-w", "-Xptxas", "-v", "-cubin"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"error: nvcc failed\n{result.stderr[:2000]}")
    return target, result.stderr


def resources(report: str, pattern: str) -> tuple[int, int]:
    """Registers, and bytes of spills, of the kernel whose mangled name contains `pattern`."""
    for entry in report.split("Compiling entry function")[1:]:
        if pattern in entry.split("'")[1]:
            spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill", entry))
            return int(re.findall(r"Used (\d+) registers", entry)[0]), spills
    raise SystemExit(f"error: ptxas reports no kernel {pattern}")


def occupancy(registers: int, block: int, arch: str) -> float:
    """Share of the threads of a multiprocessor that its registers allow."""
    per_warp = math.ceil(registers * 32 / 256) * 256
    blocks = REGISTERS // (per_warp * math.ceil(block / 32))
    return min(blocks * block, THREADS[arch], 32 * block) / THREADS[arch]


def instructions(cubin: Path, pattern: str) -> list[tuple[int, str]]:
    """Address and text of each instruction up to the last EXIT of a kernel."""
    path = os.pathsep.join((str(Path(tool("nvdisasm")).parent), os.environ.get("PATH", os.defpath)))
    command = [tool("cuobjdump"), "-sass", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path})
    for function in result.stdout.split("Function : ")[1:]:
        if pattern in function.split("\n", 1)[0]:
            lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", function)
            code = [(int(address, 16), text.strip()) for address, text in lines]
            last = max(i for i, (_, text) in enumerate(code) if re.search(r"\bEXIT\b", text))
            return code[: last + 1]
    raise SystemExit(f"error: {cubin} holds no kernel {pattern}")


def loops(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last address of each loop, inner ones first."""
    found: dict[int, int] = {}
    for address, text in code:
        branch = re.search(r"\bBRA 0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) <= address:
            target = int(branch[1], 16)
            found[target] = max(found.get(target, 0), address)
    return sorted(found.items(), key=lambda loop: loop[1] - loop[0])


def alternatives(code: list[tuple[int, str]]) -> set[int]:
    """Addresses of the shorter one of each pair of alternative branches."""
    jumps = {}  # address: (target, whether conditional)
    for address, text in code:
        branch = re.search(r"\bBRA 0x([0-9a-f]+)", text)
        if branch:
            jumps[address] = (int(branch[1], 16), text.startswith("@"))
    addresses = [address for address, _ in code]
    left_out: set[int] = set()
    for end, (behind, conditional) in jumps.items():
        starts = [at for at, (target, c) in jumps.items() if c and at < end and target == end + 16]
        if conditional or behind <= end or not starts:
            continue
        first = [address for address in addresses if max(starts) < address <= end]
        second = [address for address in addresses if end < address < behind]
        left_out.update(first if len(first) < len(second) else second)
    return left_out


def per_sample(code: list[tuple[int, str]], kernel: Kernel) -> float:
    """Instructions that a warp issues per sample of a pair.

    Raises:
        ValueError: no loop over samples is found.
    """
    rounds = len(LEVELS) if kernel.classic else math.ceil(SAMPLES / kernel.lanes)
    corner = "F2I.FLOOR" if kernel.classic else "LDG.E.128.CONSTANT"
    passes: dict[tuple[int, int], float] = {}
    inner: tuple[int, int] | None = None
    around = 0  # loops around the one over samples, so far
    for loop in loops(code):
        if inner is None and sum(corner in text for address, text in code if loop[0] <= address <= loop[1]) > 1:
            inner, passes[loop] = loop, SAMPLES / rounds
        elif inner is not None and loop[0] <= inner[0] and inner[1] <= loop[1]:
            passes[loop] = 1 if around else rounds
            around += 1
        else:
            passes[loop] = 1 if kernel.classic else rounds
    if inner is None:
        raise ValueError(f"{kernel.pattern} has no loop over samples: sass.py does not fit this compiler")
    left_out = alternatives(code)
    total = sum(
        math.prod(count for loop, count in passes.items() if loop[0] <= address <= loop[1])
        for address, _ in code
        if address not in left_out
    )
    return total / SAMPLES / (32 / kernel.lanes)


def limits(kernel: Kernel, issued: float) -> tuple[float, float]:
    """Microseconds to issue the instructions, and to move inputs and outputs once."""
    pairs = FRAMES * HEADS * sum(size * size for size in LEVELS)
    numbers = CHANNELS * kernel.value_bytes, 3 * SAMPLES * 4  # value or output; coordinates and weight of each sample
    backward = kernel.name.startswith("backward")
    moved = 3 * numbers[0] + 2 * numbers[1] if backward else 2 * numbers[0] + numbers[1]
    return 1e6 * issued * SAMPLES * pairs / ISSUED, 1e6 * moved * pairs / BANDWIDTH


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", nargs="+", choices=sorted(THREADS), default=sorted(THREADS), help="compute capability"
    )
    args = parser.parse_args()
    print(
        "| sm | kernel | registers | spilled bytes | occupancy | instructions | of classic | issue, us | memory, us |"
    )
    print("|" + "---|" * 9)
    with tempfile.TemporaryDirectory() as folder:
        for arch in args.arch:
            compiled = {source: compile_cubin(source, arch, Path(folder)) for source in (OURS, CLASSIC)}
            counts = {}
            for kernel in KERNELS:
                cubin = compiled[CLASSIC if kernel.classic else OURS][0]
                counts[kernel.name] = per_sample(instructions(cubin, kernel.pattern), kernel)
            for kernel in KERNELS:
                registers, spills = resources(compiled[CLASSIC if kernel.classic else OURS][1], kernel.pattern)
                count, share = counts[kernel.name], occupancy(registers, kernel.block, arch)
                ratio = counts[f"{kernel.name.split(',')[0]}, classic"] / count
                issue, memory = limits(kernel, count)
                print(
                    f"| {arch} | {kernel.name} | {registers} | {spills} | {share:.0%} | {count:.1f} | 1/{ratio:.1f} "
                    f"| {issue:.0f} | {memory:.0f} |"
                )


if __name__ == "__main__":
    main()
