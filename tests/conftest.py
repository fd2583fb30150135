"""Settings that all tests share."""

import os

# Workers of pytest-xdist share the cores: one thread each, for torch and for the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")

pytest_plugins = ["tests.drawn"]
