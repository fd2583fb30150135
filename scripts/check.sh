#!/usr/bin/env bash
# All checks that a change has to pass: set-up, lint, format, types, compiled operators, tests.
#   bash scripts/check.sh                 everything, under 15 minutes on two cores (MODAT_SLOW=1: the slow tests too)
#   bash scripts/check.sh --quick         under a minute: without the CUDA kernel and the tests marked `process`
#   bash scripts/check.sh -k metrics      other arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

quick=0
if [ "${1:-}" = --quick ]; then
    quick=1
    shift
    set -- -m "not process and not slow" "$@"
fi

step() { printf '\n== %s\n' "$1"; }

step "ruff check"
"$MODAT_PYTHON" -m ruff check .
step "ruff format"
"$MODAT_PYTHON" -m ruff format --check .
step "mypy"
"$MODAT_PYTHON" -m mypy
step "compiled operators"
"$MODAT_PYTHON" -m ops --build
if [ "$quick" = 1 ]; then
    echo "the CUDA kernel is left out by --quick"
elif command -v nvcc >/dev/null 2>&1; then
    # Needs no GPU. The name holds a hash of sources and tools, so it is compiled again only when they change.
    kernel="$("$MODAT_PYTHON" -c 'from ops import build; print(build.cache_folder() / ("check-" + build.tag("cuda") + ".so"))')"
    if [ ! -f "$kernel" ]; then
        "$MODAT_PYTHON" ops/build.py cuda "$kernel"
    fi
    echo "the CUDA kernel compiles: $kernel"
else
    echo "no nvcc on this machine: the CUDA kernel is not compiled"
fi
step "pytest"
"$MODAT_PYTHON" -c "import mmengine" # once before several processes do, as in setup.sh
# Two processes with one thread each are faster than one process with two threads: most tests are small.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}"
"$MODAT_PYTHON" -m pytest -n "${MODAT_TEST_WORKERS:-2}" "$@"
