#!/usr/bin/env bash
# Masks of what sounds in a video: bash scripts/predict.sh VIDEO... [options]; --help lists them.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

if [ $# -eq 0 ]; then
    set -- --help
fi
NNODES=1 modat_launch scripts/predict.py "$@"
