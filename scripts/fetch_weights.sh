#!/usr/bin/env bash
# Fetch pretrained weights into pretrained/: bash scripts/fetch_weights.sh [NAME... | CONFIG.py]; lists them without one.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$MODAT_PYTHON" "$(dirname "${BASH_SOURCE[0]}")/fetch_weights.py" "$@"
