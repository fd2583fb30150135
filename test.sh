#!/usr/bin/env bash
# Score weights: bash test.sh TASK CONFIG CHECKPOINT [key=value ...]
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"

if [ $# -eq 0 ]; then
    cat <<'USAGE'
usage: bash test.sh TASK CONFIG CHECKPOINT [options] [key=value ...]

  TASK          s4, ms3 or avss
  CONFIG        one of the configs below, or your own
  CHECKPOINT    weights, published or ours
  --split S     train, val, test (default) or unseen (stamps of other photographs and recordings)
  --audio A     real (default), silence, noise, or shuffled: each clip with the audio of another clip
  --robust      score with the clips' own audio, silence, noise and the audio of clips of another group, of which nothing
                is visible: mIoU, F, share of painted pixels, and their balance, G-mIoU and G-F
  --explain     also draw which pixels go to which expert, and what the queries attend to
  --save-masks  write the predicted masks in the layout of AVSBench
  --oracle      score the masks of all objects, sounding or not, instead of CHECKPOINT (stamps data)
  key=value     any key of the config

USAGE
    modat_configs
    exit 2
fi
NNODES=1 modat_launch test.py "$@"
