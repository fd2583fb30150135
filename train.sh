#!/usr/bin/env bash
# Train a model: bash train.sh TASK CONFIG [key=value ...]
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/launch.sh"

if [ $# -eq 0 ]; then
    cat <<'USAGE'
usage: bash train.sh TASK CONFIG [--resume | --overwrite | --smoke] [--init-from CHECKPOINT] [key=value ...]

  TASK         s4, ms3 or avss
  CONFIG       one of the configs below, or your own
  --resume     continue from the last checkpoint of the run
  --overwrite  delete the run in work_dir/<config name> and start again
  --init-from  start from another run's weights, as far as they fit: ms3 from s4, another number of classes
  --smoke      try config and machine in two minutes on drawn data: two steps, validation, checkpoint, resume, test
  key=value    any key of the config: process.train_epochs=3 optimizer.lr=1e-4

Creates the environment and, for the *_stamps.py configs, the data if they are missing. Uses all GPUs of this machine;
several machines: NNODES=4 NODE_RANK=0..3 MASTER_ADDR=host bash train.sh ..., or srun bash train.sh ... under SLURM.
OMP_NUM_THREADS, OMP_WAIT_POLICY=ACTIVE and MODAT_KEEP_ALLOCATOR=0 override what is chosen for the CPU.

USAGE
    modat_configs
    exit 2
fi
modat_launch train.py "$@"
