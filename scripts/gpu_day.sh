#!/usr/bin/env bash
# Everything that a GPU can tell about this project, in an hour: bash scripts/gpu_day.sh [--dry] [--out DIR] [--minutes 60]
# Parts run in the order of their worth, each with its own time limit; DIR/report.md is written anew after each of them.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # not `cd`: --out is relative to where the user stands
exec "$MODAT_PYTHON" -m scripts.gpu_day "$@"
