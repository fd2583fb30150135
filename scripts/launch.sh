#!/usr/bin/env bash
# Shared by train.sh and test.sh, which source it: modat_launch SCRIPT ARGUMENTS...

MODAT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

modat_configs() {
    echo "shipped configs:"
    (cd "$MODAT_ROOT" && find config -name '*.py' -not -path '*/_base_/*' | LC_ALL=C sort | sed 's/^/  /')
}

# By default glibc returns large blocks to the system when they are freed and faults them in again at the next use: a
# third of the time of a forward pass on a CPU. These settings keep them, in pages of 2 MB. tcmalloc, where installed,
# keeps them with less fragmentation, so a training step takes less memory. Settings of the user take precedence.
modat_keep_allocator() {
    if [ "${MODAT_KEEP_ALLOCATOR:-1}" = 0 ]; then
        return 0
    fi
    local library
    library="$(PATH="$PATH:/usr/sbin:/sbin" ldconfig -p 2>/dev/null |
        awk '$1 ~ /^libtcmalloc(_minimal)?\.so\.[0-9]+$/ { print $NF; exit }')" || true
    if [ -n "$library" ] && [ -z "${LD_PRELOAD:-}" ]; then
        export LD_PRELOAD="$library"
        export TCMALLOC_RELEASE_RATE="${TCMALLOC_RELEASE_RATE:-0}"
        export TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD="${TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD:-1099511627776}"
    else
        export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
        export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}"
        export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"
        export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
        library=glibc
    fi
    echo "allocator: $library keeps freed memory for the next step (MODAT_KEEP_ALLOCATOR=0 turns this off)" >&2
}

# Sets OMP_NUM_THREADS to the CPUs that this process may use, divided by the number of processes per machine, and
# OMP_WAIT_POLICY to passive waiting. By default an OpenMP thread spins at each barrier: beside one other busy process
# on two cores, a training step with two spinning threads takes 16 to 20 times as long as with one; with passive threads,
# it takes 1.1 times as long. On an idle machine passive waiting costs a small model 3 to 24 % (RESULTS.md).
# Settings of the user take precedence.
modat_set_threads() {
    local processes="$1" threads waiting cores affinity online quota detail
    affinity="$(modat_affinity)"
    online="$(modat_expand "$(cat "${MODAT_SYSTEM_ROOT:-}/sys/devices/system/cpu/online" 2>/dev/null)" | wc -l)"
    if [ -n "${OMP_NUM_THREADS:-}" ]; then
        threads="$OMP_NUM_THREADS"
        detail="OMP_NUM_THREADS"
    else
        cores="$(modat_cores)"
        quota="$(modat_quota)"
        threads="$cores"
        if [ -n "$quota" ] && [ "$((quota / 100))" -lt "$threads" ]; then
            threads="$((quota / 100))"
        fi
        threads="$((threads / processes))"
        if [ "$threads" -lt 1 ]; then
            threads=1
        fi
        if [ -n "$quota" ]; then
            detail="quota $((quota / 100)).$((quota % 100 / 10))"
        else
            detail="no quota"
        fi
        detail="$detail, affinity $affinity of $((online))"
        if [ "$cores" -ne "$affinity" ]; then
            detail="$detail, $cores cores"
        fi
        export OMP_NUM_THREADS="$threads"
    fi
    if [ "$processes" -gt 1 ]; then
        detail="$detail; for each of $processes processes"
    fi
    if [ -n "${OMP_WAIT_POLICY:-}" ]; then
        waiting="OMP_WAIT_POLICY=$OMP_WAIT_POLICY"
    elif [ -n "${GOMP_SPINCOUNT:-}" ]; then
        waiting="GOMP_SPINCOUNT=$GOMP_SPINCOUNT"
    else
        export OMP_WAIT_POLICY=PASSIVE
        waiting="passive waiting"
    fi
    echo "cpu: $threads thread$([ "$threads" = 1 ] || echo s) ($detail), $waiting" >&2
}

# CPUs that this process may run on, one number per line. MODAT_SYSTEM_ROOT: where tests put their own /proc and /sys.
modat_allowed_cpus() {
    modat_expand "$(awk '/^Cpus_allowed_list:/ { print $2 }' "${MODAT_SYSTEM_ROOT:-}/proc/self/status" 2>/dev/null)"
}

# A list as the kernel writes it, 0-2,5 -> one number per line.
modat_expand() {
    local range
    for range in ${1//,/ }; do
        seq "${range%-*}" "${range#*-}"
    done
}

modat_affinity() {
    local count
    count="$(modat_allowed_cpus | wc -l)"
    if [ "$count" -lt 1 ]; then
        count="$(getconf _NPROCESSORS_ONLN)"
    fi
    echo "$((count))"
}

# Physical cores among them: two hyperthreads of a core share its vector units.
modat_cores() {
    local count cpu
    count="$(modat_allowed_cpus | while read -r cpu; do
        cat "${MODAT_SYSTEM_ROOT:-}/sys/devices/system/cpu/cpu$cpu/topology/thread_siblings_list" 2>/dev/null ||
            echo "$cpu"
    done | sort -u | wc -l)"
    if [ "$count" -lt 1 ]; then
        count="$(modat_affinity)"
    fi
    echo "$((count))"
}

# The smallest CPU quota of this process's control groups and their parents, in hundredths of a CPU; nothing where there
# is none. Version 2: cpu.max; version 1: cpu.cfs_quota_us and cpu.cfs_period_us. In a container the path in
# /proc/self/cgroup may not exist below the mount, whose root is then the container's own group.
modat_quota() {
    local root="${MODAT_SYSTEM_ROOT:-}/sys/fs/cgroup" controllers path mount folder quota period least=""
    while IFS=: read -r _ controllers path; do
        case ",$controllers," in
        ,,) set -- "$root" "$root/unified" ;;
        *,cpu,*) set -- "$root/$controllers" "$root/cpu" ;;
        *) continue ;;
        esac
        for mount in "$@"; do
            folder="$path"
            while :; do
                folder="${folder%/}"
                quota="" period=""
                if [ -r "$mount$folder/cpu.max" ]; then
                    read -r quota period <"$mount$folder/cpu.max" || true
                elif [ -r "$mount$folder/cpu.cfs_quota_us" ] && [ -r "$mount$folder/cpu.cfs_period_us" ]; then
                    read -r quota <"$mount$folder/cpu.cfs_quota_us" || true
                    read -r period <"$mount$folder/cpu.cfs_period_us" || true
                fi
                if [[ "$quota" =~ ^[0-9]+$ && "$period" =~ ^[1-9][0-9]*$ ]]; then
                    quota="$((100 * quota / period))"
                    if [ -z "$least" ] || [ "$quota" -lt "$least" ]; then
                        least="$quota"
                    fi
                fi
                [ -n "$folder" ] || break
                folder="${folder%/*}"
            done
        done
    done < <(cat "${MODAT_SYSTEM_ROOT:-}/proc/self/cgroup" 2>/dev/null)
    echo "$least"
}

# Whether SLURM starts the processes of the run: not in an interactive allocation (a job named bash or interactive).
modat_slurm() {
    [ -n "${SLURM_NTASKS:-}" ] && [ "${SLURM_JOB_NAME:-}" != bash ] && [ "${SLURM_JOB_NAME:-}" != interactive ]
}

# Processes that a launch starts on this machine, from the command line (process.devices=N), GPUS or the GPUs found.
# Under SLURM each task is launched by itself: with CPUs of its own where SLURM_CPUS_PER_TASK says so.
modat_processes() {
    local argument devices="" count
    for argument in "$@"; do
        case "$argument" in process.devices=*) devices="${argument#*=}" ;; esac
    done
    if modat_slurm; then
        devices=1
        if [ -z "${SLURM_CPUS_PER_TASK:-}" ]; then
            devices="${SLURM_NTASKS_PER_NODE:-1}"
        fi
    elif [ "${NNODES:-1}" -gt 1 ] && [ -n "${GPUS:-}" ]; then
        devices="$GPUS"
    fi
    if [[ "$devices" =~ ^[1-9][0-9]*$ ]]; then
        echo "$devices"
        return 0
    fi
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        count="$(awk -F, '{ print NF }' <<<"$CUDA_VISIBLE_DEVICES")"
    else
        count="$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU ' || true)"
    fi
    echo "$((count > 1 ? count : 1))"
}

modat_launch() {
    local script="$MODAT_ROOT/$1"
    shift
    # shellcheck source=scripts/setup.sh
    source "$MODAT_ROOT/scripts/setup.sh"
    modat_keep_allocator
    if [ "$(basename "$script")" = train.py ]; then
        modat_set_threads "$(modat_processes "$@")"
    else
        modat_set_threads 1
    fi
    if modat_slurm && [ -z "${NODE_RANK:-}" ]; then
        # Each task of srun is one process of the run; without srun, one process would wait for the others forever.
        if [ "$SLURM_NTASKS" -gt 1 ] && [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; then
            echo "error: the job has $SLURM_NTASKS tasks, and this is none of them: start it with srun, as" \
                "'srun bash $(basename "${script%.py}").sh ...' (scripts/slurm/ has job files)" >&2
            exit 2
        fi
    elif [ "${NNODES:-1}" -gt 1 ]; then
        # Several machines: the same command on each, with its own NODE_RANK.
        exec "$MODAT_PYTHON" -m torch.distributed.run --nnodes "$NNODES" \
            --node-rank "${NODE_RANK:?error: NNODES=$NNODES needs NODE_RANK, the number of this machine from 0}" \
            --nproc-per-node "${GPUS:-gpu}" \
            --master-addr "${MASTER_ADDR:?error: NNODES=$NNODES needs MASTER_ADDR, the first machine}" \
            --master-port "${MASTER_PORT:-29500}" "$script" "$@"
    fi
    exec "$MODAT_PYTHON" "$script" "$@"
}
