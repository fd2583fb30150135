#!/usr/bin/env bash
# Configs x seeds, trained, scored and compared in one table: bash scripts/ablate.sh CONFIG... [options]; --help lists them.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/setup.sh
source "$root/scripts/setup.sh"
if [ $# -eq 0 ]; then
    set -- --help
fi
# Threads and allocator are chosen by train.sh and test.sh, per run.
exec "$MODAT_PYTHON" "$root/scripts/ablate.py" "$@"
