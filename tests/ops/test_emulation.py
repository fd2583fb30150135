"""The emulation of CUDA itself: it raises where CUDA is undefined, and its checks notice planted faults."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops import faults, support
from tests.ops.emulation import build

pytestmark = pytest.mark.skipif(bool(build.unavailable()), reason=build.unavailable() or "available")
SLOW = pytest.mark.skipif("MODAT_SLOW" not in os.environ, reason="compiles for minutes: set MODAT_SLOW=1")

# Kernels of one warp or two; each writes what it computes to `out`.
PROGRAM = r"""
#include <cuda_runtime.h>
#include <string>
static float out[64];
static void sum() { out[threadIdx.x] = __shfl_xor_sync(~0u, float(threadIdx.x), 1) + __shfl_sync(~0u, 1.0f, 3, 8); }
static void vote() { out[threadIdx.x] = __popc(__ballot_sync(~0u, threadIdx.x % 5 == 0)); }
static void turn() {
  auto* shared = (float*)emu::shared_memory();
  out[threadIdx.x] = shared[63 - threadIdx.x];
  shared[threadIdx.x] = threadIdx.x;
  __syncthreads();
  if (out[threadIdx.x] != out[threadIdx.x]) out[threadIdx.x] = shared[63 - threadIdx.x];
}
static void ended() { if (threadIdx.x != 5) __syncwarp(); }
static void lacks() { __syncwarp(threadIdx.x == 5 ? ~0u : 0xffffu << threadIdx.x / 16 * 16 << 16); }
static void other() { threadIdx.x < 4 ? void(__ballot_sync(~0u, 1)) : __syncwarp(); }
static void outside() { if (threadIdx.x < 8) __shfl_sync(0xffu, 1.0f, 9); }
static void barrier() { if (threadIdx.x < 32) __syncthreads(); }
static void waits() { threadIdx.x == 5 ? __syncthreads() : __syncwarp(); }
static void unaligned() { atomicAdd((float4*)(out + 1), make_float4(1, 1, 1, 1)); }
extern "C" const char* run(const char* name, float* into) {
  static std::string said;
  const std::string wanted = name;
  memset(out, 0, sizeof out);
  try {
#define KERNEL(kernel) if (wanted == #kernel) emu::launch(1, 64, 64 * sizeof(float), nullptr, kernel);
    KERNEL(sum) KERNEL(vote) KERNEL(turn) KERNEL(ended) KERNEL(lacks) KERNEL(other) KERNEL(outside)
    KERNEL(barrier) KERNEL(waits) KERNEL(unaligned)
    said = "";
  } catch (const std::exception& error) {
    said = error.what();
  }
  memcpy(into, out, sizeof out);
  return said.c_str();
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "program.cpp").write_text(PROGRAM)
    command = ["g++", "-std=c++20", "-fPIC", "-shared", "-w", "-D__CUDA_ARCH__=900"]
    command += [f"-I{build.HERE}", f"-I{build.HERE / 'include'}", str(build.HERE / "emulator.cpp"), "program.cpp"]
    subprocess.run([*command, "-o", "program.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "program.so"))
    library.run.restype = ctypes.c_char_p
    return library


def run(program: ctypes.CDLL, name: str) -> tuple[list[float], str]:
    out = (ctypes.c_float * 64)()
    said = program.run(name.encode(), out).decode()
    return list(out), said


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sum", [(lane ^ 1) + 1 for lane in range(64)]),
        ("vote", [7] * 32 + [6] * 32),
        ("turn", list(range(63, -1, -1))),  # shared memory is NaN at first
    ],
)
def test_warp_functions_and_shared_memory(program, name, expected):
    for seed in (0, 1, 2):
        program.emulator_order(seed)
        assert run(program, name) == (expected, "")
    program.emulator_order(0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ended", "a mask names lane 5, which has ended"),
        ("lacks", "__syncwarp: the mask lacks the lane that calls"),
        ("other", "lanes 0 and 4 meet in __ballot_sync and __syncwarp"),
        ("outside", "a shuffle reads lane 9, outside of its mask"),
        ("barrier", "__syncthreads() after some threads have ended"),
        ("waits", "threads wait for others that never arrive"),
        ("unaligned", "an unaligned vector atomic"),
    ],
)
def test_what_cuda_leaves_undefined_raises(program, name, message):
    assert message in run(program, name)[1]


@pytest.mark.parametrize(
    "text", ["void f() {}", "__shared__ int x[3]; f<<<1, 1, 0, stream>>>(x);", "f<<<1, 1, 0, s>>>(x)"]
)
def test_source_that_cannot_be_rewritten_is_refused(text):
    with pytest.raises(ValueError, match="a launch or a shared array that as_cpp does not know"):
        build.as_cpp(text)


def test_the_operators_run_the_emulated_kernels_while_active(emulation):
    data = support.draw(((4, 3),))
    before = emulation.counts()[0]
    support.agree(data, ((4, 3),), torch.float32, "cpu", support.BOUND[torch.float32])
    assert emulation.counts()[0] == before
    with emulation.active():
        support.agree(data, ((4, 3),), torch.float32, "cpu", support.BOUND[torch.float32])
    assert emulation.counts()[0] > before


def test_cards_before_sm_90_add_scalars(emulation):
    data = support.draw(((4, 3),), channels=32)
    added = []
    for variant in (emulation, build.load("sm_75")):
        before = variant.counts()[1]
        with variant.active():
            support.agree(data, ((4, 3),), torch.float32, "cpu", support.BOUND[torch.float32])
        added.append(variant.counts()[1] - before)
    assert 0 < 4 * added[0] == added[1]


@pytest.mark.parametrize(
    "name", [name if name in faults.CHEAP else pytest.param(name, marks=SLOW) for name in faults.FAULTS]
)
def test_a_planted_fault_is_noticed(cpu_kernel, name):
    assert faults.caught(name)


def test_the_kernels_without_a_fault_pass_the_same_checks(emulation):
    assert not faults.noticed(emulation.path)


@SLOW
def test_addresses_and_arithmetic_hold_under_the_sanitizers(cpu_kernel):
    build.library("sanitized")
    folder = Path(subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout).parent
    fresh_memory_is_nan = "max_malloc_fill_size=100000000:malloc_fill_byte=255"
    environment = {
        **os.environ,
        "MODAT_EMULATION": "sanitized",
        "LD_PRELOAD": f"{folder}/libasan.so {folder}/libubsan.so",
        "ASAN_OPTIONS": f"detect_leaks=0:detect_stack_use_after_return=0:{fresh_memory_is_nan}",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "emulated"]
    tests = [str(Path(__file__).with_name(name)) for name in ("test_cuda.py", "test_parity.py")]
    result = subprocess.run([*command, *tests], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout
    command = [sys.executable, "-m", "tests.ops.faults", *faults.SANITIZED]
    result = subprocess.run(command, env=environment, cwd=build.HERE.parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
