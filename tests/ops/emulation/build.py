"""Compiles the CUDA kernels for the CPU and puts them in the place of the CPU kernels.

`ops/src/cuda.cpp` and `cuda_kernels.cu` are compiled by g++ as they are, except for three rewritten constructs: kernel
launches, `extern __shared__` arrays, and the registration for CUDA. The headers of CUDA and of c10/cuda are those in
`include/`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ops import build

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "ops" / "src"
# A GPU faults on an unaligned access, x86-64 does not: the sanitizer ends the process and says where.
ALIGNMENT = ("-O1", "-fsanitize=alignment", "-fno-sanitize-recover=all")
SANITIZERS = (
    *("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined,float-cast-overflow"),
    *("-fno-sanitize=vptr", "-fno-sanitize-recover=all"),
)
VARIANTS = {"sm_90": ("900", ALIGNMENT), "sm_75": ("750", ALIGNMENT), "sanitized": ("900", SANITIZERS)}
"""Name: value of __CUDA_ARCH__, flags of the kernels."""

LAUNCH = re.compile(r"(?P<kernel>\b\w+(?:<[\w\s,:]+>)?)\s*<<<(?P<launch>[^;]*?)>>>\s*\((?P<arguments>[^;]*)\);")
SHARED = re.compile(r"extern __shared__ (?:__align__\(16\) )?unsigned char (\w+)\[\];")
OPERATORS = """
#include <memory>
static std::unique_ptr<torch::Library> emulated;
extern "C" void emulation_enter() {
  emulated = std::make_unique<torch::Library>(torch::Library::IMPL, "modat", c10::DispatchKey::CPU, __FILE__, __LINE__);
  emulated_operators(*emulated);
}
extern "C" void emulation_leave() { emulated.reset(); }
"""


@functools.cache
def unavailable() -> str:
    """Why there is no emulation on this machine; empty if there is."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the emulation needs Linux on x86-64"
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return "the emulation needs a processor with AVX2"
    if shutil.which("g++") is None:
        return "the emulation needs g++"
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True).stdout.strip()
    return "" if int(version.split(".")[0]) >= 12 else f"the emulation needs g++ 12 or newer, this is {version}"


def as_cpp(kernels: str) -> str:
    """The text of a .cu file as C++."""
    text, launches = LAUNCH.subn(r"emu::launch(\g<launch>, [&] { \g<kernel>(\g<arguments>); });", kernels)
    text = SHARED.sub(r"unsigned char* const \1 = emu::shared_memory();", text)
    if launches == 0 or "<<<" in text or "__shared__" in text:
        raise ValueError("cuda_kernels.cu holds a launch or a shared array that as_cpp does not know")
    return text


def as_cpu_operators(binding: str) -> str:
    """The text of cuda.cpp, registering its operators for CPU tensors from emulation_enter to emulation_leave."""
    registration = "TORCH_LIBRARY_IMPL(modat, CUDA, m) {"
    if binding.count(registration) != 1:
        raise ValueError(f"cuda.cpp does not hold {registration!r}")
    return binding.replace(registration, "static void emulated_operators(torch::Library& m) {") + OPERATORS


def library(variant: str = "sm_90", sources: Mapping[str, str] | None = None) -> Path:
    """Path of the emulated kernels, compiled unless in the cache of ops/build.py.

    Args:
        variant: key of VARIANTS.
        sources: texts by file name that replace those of ops/src.
    """
    from torch.utils import cpp_extension  # warns where there is no GPU

    arch, flags = VARIANTS[variant]
    texts = {path.name: path.read_text() for path in sorted(SOURCES.glob("cuda*"))} | dict(sources or {})
    headers = {name: text for name, text in texts.items() if name.endswith(".h")}
    others = sorted((*HERE.rglob("*.h"), SOURCES / "kernel.h", SOURCES / "library.h"))
    state = (headers, [path.read_text() for path in others], torch.__version__)
    compiler = ("g++", "-std=c++20", "-fPIC", "-w", "-march=x86-64-v3", "-ffp-contract=fast", "-fno-gnu-unique")
    torch_headers = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    units = {
        "emulator": ((HERE / "emulator.cpp").read_text(), flags),
        "binding": (as_cpu_operators(texts["cuda.cpp"]), ("-O1", *torch_headers)),
        "kernels": (as_cpp(texts["cuda_kernels.cu"]), (f"-D__CUDA_ARCH__={arch}", *flags)),
    }
    cache = build.cache_folder() / "emulation"
    cache.mkdir(parents=True, exist_ok=True)
    objects = []
    for name, (text, unit_flags) in units.items():
        parts = (compiler, unit_flags, text, state)
        target = cache / f"{name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.o"
        objects.append(target)
        with build._lock(target.with_suffix(".lock")):
            if target.exists():
                continue
            folder = target.with_suffix("")
            folder.mkdir(exist_ok=True)
            for header, header_text in headers.items():
                (folder / header).write_text(header_text)
            (folder / "unit.cpp").write_text(f'#line 1 "{name}"\n{text}')
            includes = [f"-I{path}" for path in (folder, HERE, HERE / "include", SOURCES)]
            _run([*compiler, *unit_flags, *includes, "-c", str(folder / "unit.cpp"), "-o", f"{target}.part"])
            os.replace(f"{target}.part", target)
            shutil.rmtree(folder)
    digest = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    target = cache / f"{variant}-{digest}.so"
    with build._lock(target.with_suffix(".lock")):
        if not target.exists():
            folders = cpp_extension.library_paths()
            links = [flag for path in folders for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
            sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
            links += ["-ltorch", "-ltorch_cpu", "-lc10", "-Wl,-z,defs", *(["-lubsan"] if sanitizers else [])]
            _run(["g++", "-shared", *sanitizers, *map(str, objects), *links, "-o", f"{target}.part"])
            os.replace(f"{target}.part", target)
    return target


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[:2000]}")


class Emulation:
    """Loaded kernels. The CPU library of ops, which defines the operators, must be loaded first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The operators run the emulated kernels on CPU tensors."""
        self._library.emulation_enter()
        try:
            yield
        finally:
            self._library.emulation_leave()

    @contextlib.contextmanager
    def order(self, seed: int) -> Iterator[None]:
        """Threads and blocks run in an order drawn from `seed`; 0: one after another."""
        self._library.emulator_order(seed)
        try:
            yield
        finally:
            self._library.emulator_order(0)

    def counts(self) -> tuple[int, int]:
        """Kernel launches and atomic operations so far."""
        numbers = (ctypes.c_int64 * 2)()
        self._library.emulator_counts(numbers)
        return numbers[0], numbers[1]


@functools.cache
def load(variant: str = "sm_90") -> Emulation:
    """The kernels of ops/src."""
    return Emulation(library(variant))
