#!/usr/bin/env bash
# Everything that has to hold before a change lands: set-up, lint, format, types, compiled operators, tests.
# Arguments go to pytest: bash scripts/check.sh -k metrics
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

step() { printf '\n== %s\n' "$1"; }

step "ruff check"
"$MODAT_PYTHON" -m ruff check .
step "ruff format"
"$MODAT_PYTHON" -m ruff format --check .
step "mypy"
"$MODAT_PYTHON" -m mypy
step "compiled operators"
"$MODAT_PYTHON" -m ops --build
if command -v nvcc >/dev/null 2>&1; then
    # Needs no GPU; kept under a name of its sources and tools, so that it is compiled again only when they change.
    kernel="$("$MODAT_PYTHON" -c 'from ops import build; print(build.cache_folder() / ("check-" + build.tag("cuda") + ".so"))')"
    if [ ! -f "$kernel" ]; then
        "$MODAT_PYTHON" ops/build.py cuda "$kernel"
    fi
    echo "the CUDA kernel compiles: $kernel"
else
    echo "no nvcc on this machine: the CUDA kernel is not compiled"
fi
step "pytest"
"$MODAT_PYTHON" -c "import mmengine" # as in setup.sh: once before several processes do
# Two processes with one thread each beat one process with two threads: most tests are small.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
"$MODAT_PYTHON" -m pytest -n "${MODAT_TEST_WORKERS:-2}" "$@"
