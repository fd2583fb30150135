import pytest

from ops import build
from ops.library import has_kernel


@pytest.fixture(scope="session")
def cpu_kernel() -> None:
    if not has_kernel("cpu"):
        pytest.skip(f"no compiled kernel: {build.load('cpu').reason}")
