"""Commands with a time limit, which end with all processes that they have started."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
GRACE = 5.0  # seconds between SIGTERM and SIGKILL


def adopt_orphans() -> None:
    """Become the parent of processes whose own parent has ended, so that they are found and ended too (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run_limited(
    command: Sequence[str],
    log: Path,
    seconds: float,
    *,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    grace: float = GRACE,
) -> tuple[int | None, float]:
    """Run a command, its output appended to a file, and end it with its children when its time is over.

    Args:
        command: program and arguments.
        log: receives the command line and its output.
        seconds: until SIGTERM.
        folder: where it runs.
        environment: its variables; None: those of this process.
        grace: seconds between SIGTERM and SIGKILL.

    Returns:
        Its exit status, None where it ran over its time, and the seconds it took.
    """
    start = time.monotonic()
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=max(seconds, 0.0))
        finally:
            end_with_children(process, grace)
        took = time.monotonic() - start
        words = f"over its time of {seconds:.0f} s" if status is None else f"status {status}"
        output.write(f"[{words}, {took:.1f} s]\n\n".encode())
    return status, took


def end_with_children(process: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """End a process, its process group and its descendants, those with sessions of their own included."""
    # Where this process adopts orphans, those that the command has left behind are its own children by now.
    _signal(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and _alive(process):
        time.sleep(0.02)
    while _alive(process):
        _signal(process.pid, signal.SIGKILL)
        time.sleep(0.02)


def _signal(leader: int, number: int) -> None:
    targets = set(_started_by(leader))
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)
    for pid in targets:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process or anything it has started runs; ended ones are collected."""
    process.poll()
    for pid in _started_by(process.pid):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # an orphan that has ended waits for its new parent
    return process.returncode is None or any(True for _ in _started_by(process.pid))


def _started_by(leader: int) -> list[int]:
    """Descendants of a process, and, once orphaned, of its session or adopted here since it was started."""
    parents: dict[int, int] = {}
    sessions: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            # pid (name) state ppid pgrp session ...: the name may hold spaces and brackets.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)], sessions[int(entry.name)] = int(fields[1]), int(fields[3])
    own = os.getpid()
    found = {pid for pid, session in sessions.items() if session == leader and pid != leader}
    # Processes that this one starts keep its session, so a child with another one was started by a command.
    found |= {pid for pid, parent in parents.items() if parent == own and sessions[pid] != sessions[own]} - {leader}
    while more := {pid for pid, parent in parents.items() if parent in found | {leader}} - found - {leader}:
        found |= more
    return sorted(found)
