#!/usr/bin/env bash
# What train.sh and test.sh share; sourced by them. modat_launch SCRIPT ARGUMENTS...

MODAT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

modat_configs() {
    echo "shipped configs:"
    (cd "$MODAT_ROOT" && find config -name '*.py' -not -path '*/_base_/*' | LC_ALL=C sort | sed 's/^/  /')
}

# glibc hands large blocks back to the system when they are freed, and takes them again, page fault by page fault, a
# moment later: a third of the time of a forward pass on a CPU. These make it keep them, in pages of 2 MB. tcmalloc, where
# it is installed, keeps them as well, and leaves fewer gaps between them: a training step then takes less memory. What
# the user has set stays.
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

modat_launch() {
    local script="$MODAT_ROOT/$1"
    shift
    # shellcheck source=scripts/setup.sh
    source "$MODAT_ROOT/scripts/setup.sh"
    modat_keep_allocator
    if [ "${NNODES:-1}" -gt 1 ]; then
        # Several machines, the same command on each, with NODE_RANK its number; SLURM needs none of this.
        exec "$MODAT_PYTHON" -m torch.distributed.run --nnodes "$NNODES" \
            --node-rank "${NODE_RANK:?error: NNODES=$NNODES needs NODE_RANK, the number of this machine from 0}" \
            --nproc-per-node "${GPUS:-gpu}" \
            --master-addr "${MASTER_ADDR:?error: NNODES=$NNODES needs MASTER_ADDR, the first machine}" \
            --master-port "${MASTER_PORT:-29500}" "$script" "$@"
    fi
    exec "$MODAT_PYTHON" "$script" "$@"
}
