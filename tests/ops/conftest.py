import os
from collections.abc import Iterator

import pytest
import torch

from ops import build
from ops.library import has_kernel
from tests.ops.emulation import build as emulation_build

CAPABILITIES = ("avx512", "avx2", "portable")
EMULATED = pytest.param("emulated", marks=pytest.mark.process)
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


@pytest.fixture(autouse=True)
def nondeterministic() -> None:
    """Training in an earlier test of this process may have asked for deterministic algorithms."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def cpu_kernel() -> None:
    if not has_kernel("cpu"):
        pytest.skip(f"no compiled kernel: {build.load('cpu').reason}")


@pytest.fixture(scope="session")
def emulation(cpu_kernel: None) -> emulation_build.Emulation:
    """The CUDA kernels, compiled for the CPU; MODAT_EMULATION names another variant."""
    reason = emulation_build.unavailable()
    if reason:
        pytest.skip(reason)
    return emulation_build.load(os.environ.get("MODAT_EMULATION", "sm_90"))


def _use(kernel: str, request: pytest.FixtureRequest) -> Iterator[str]:
    if kernel == "emulated":
        with request.getfixturevalue("emulation").active():
            yield kernel
        return
    if kernel in CAPABILITIES:
        request.getfixturevalue("cpu_kernel")
        request.getfixturevalue("monkeypatch").setenv("MODAT_CPU_CAPABILITY", kernel)
        if torch.ops.modat.cpu_capability() != kernel:
            pytest.skip(f"this processor has no {kernel}")
    yield kernel


@pytest.fixture(params=[*CAPABILITIES, EMULATED, CUDA])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each compiled kernel in turn."""
    yield from _use(request.param, request)


@pytest.fixture
def device(kernel: str) -> str:
    """Device of the tensors for `kernel`, also the name of its backend."""
    return "cuda" if kernel == "cuda" else "cpu"


@pytest.fixture(params=[EMULATED, CUDA])
def gpu_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CUDA kernels: emulated, and on a GPU if there is one."""
    yield from _use(request.param, request)


@pytest.fixture
def gpu(gpu_kernel: str) -> str:
    """Device of the tensors for `gpu_kernel`, also the name of its backend."""
    return "cuda" if gpu_kernel == "cuda" else "cpu"
