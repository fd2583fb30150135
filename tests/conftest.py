"""Settings that all tests share, and the tests that `scripts/check.sh --quick` leaves out."""

import os

import pytest

# Workers of pytest-xdist share the cores: one thread each, for torch and for the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")

pytest_plugins = ["tests.drawn"]

PROCESS = (
    "tests/test_bad_config.py",
    "tests/test_bad_disk.py",
    "tests/test_distributed.py",
    "tests/test_resume.py",
    "tests/scripts/test_benchmark.py",
    "tests/scripts/test_engine.py",
    "tests/scripts/test_feature_cache.py",
    "tests/scripts/test_launchers.py",
    "tests/scripts/test_make_stamps.py",
    "tests/ops/test_build.py",
    "tests/ops/test_cuda.py",
    "tests/ops/test_emulation.py",
    "tests/model/test_compile.py",
    "tests/model/test_published_numbers.py",
    "tests/model/test_contract.py::test_the_backbone_skips_padded_frames",
    "tests/model/test_contract.py::test_masks_of_some_frames_are_those_of_all_frames",
    "tests/model/test_criterion.py::test_two_processes_with_uneven_labels_give_one_processs_gradient",
    "tests/utils/test_config.py::test_published_files_run_unchanged",
    "tests/utils/test_config.py::test_every_shipped_config_takes_a_training_step",
    "tests/utils/test_metrics.py::test_two_processes_count_what_one_counts",
)
"""Files and tests that start processes, compile, train or run full-size models: marked `process`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests listed in PROCESS."""
    for item in items:
        name = item.nodeid.partition("[")[0]
        if name in PROCESS or name.partition("::")[0] in PROCESS:
            item.add_marker(pytest.mark.process)
