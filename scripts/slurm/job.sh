# shellcheck shell=bash
# Sourced by the job files: modat_job COMMAND... runs a command on all tasks of the job, and queues it again when its time
# is up. A job file asks for `--signal=B:USR1@SECONDS`: SLURM then sends SIGUSR1 to the job file's shell so long before
# the end. It is handed on to the tasks, which save after the step under way and exit with 128 + SIGUSR1.
# SIGTERM (scancel, or preemption, after which SLURM queues the job again by itself) saves as well, and ends the job.

modat_job() {
    local task status interrupted requeue=""
    # Where the processes of several machines meet; the port follows from the number of the job.
    MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
    export MASTER_ADDR
    export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}" # not passed on from sbatch since SLURM 22.05
    # Where one task fails the others would wait for it.
    srun --kill-on-bad-exit=1 "$@" &
    task=$!
    trap 'interrupted=1 requeue=1; kill -USR1 "$task" 2>/dev/null || true' USR1
    trap 'interrupted=1 requeue=""; kill -TERM "$task" 2>/dev/null || true' TERM
    while :; do
        interrupted="" status=0
        wait "$task" || status=$?
        [ -n "$interrupted" ] || break # the wait was not cut short by a signal to this shell
    done
    trap - USR1 TERM
    if [ -n "$requeue" ] && [ "$status" -eq $((128 + $(kill -l USR1))) ]; then
        echo "job $SLURM_JOB_ID: saved before its time was up, and queued again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
