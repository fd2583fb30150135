"""Environments of the processes that are timed: allocator defaults, or settings that keep freed memory."""

import os
import subprocess
from pathlib import Path

LAUNCHER = Path(__file__).parents[1] / "launch.sh"


def glibc_defaults() -> dict[str, str]:
    """The environment of this process without allocator settings."""
    return {name: value for name, value in os.environ.items() if not _of_allocator(name)}


def memory_kept() -> dict[str, str]:
    """The same with the settings of train.sh and test.sh, which keep freed memory."""
    plain = glibc_defaults()
    command = ["bash", "-c", 'source "$0" && modat_keep_allocator 2>/dev/null && env -0', str(LAUNCHER)]
    printed = subprocess.run(command, env=plain, stdout=subprocess.PIPE, check=True).stdout.decode()
    told = dict(entry.split("=", 1) for entry in printed.split("\0") if entry)
    return plain | {name: value for name, value in told.items() if _of_allocator(name)}


def _of_allocator(name: str) -> bool:
    return name in ("LD_PRELOAD", "GLIBC_TUNABLES") or name.startswith(("MALLOC_", "TCMALLOC_"))
