#!/usr/bin/env bash
# Build the deformable attention operators before their first use, into the cache of ops/build.py.
#   bash ops/make.sh            uses $PYTHON, else the active environment, else .venv, else python3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-}
if [[ -z $python ]]; then
  if [[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then python=python
  elif [[ -x .venv/bin/python ]]; then python=.venv/bin/python
  else python=python3; fi
fi
exec "$python" -m ops --build
