"""Atomic writing of files, and the messages where a file cannot be written."""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.errors import CheckpointError

LAST = "last.ckpt"
"""A run's checkpoint, in its folder."""

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextmanager
def atomic_path(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Write a file atomically: readers, and processes that write the same file, never see an incomplete one.

    Args:
        path: the file to make or replace; its folder is made.
        durable: sync file and folder, so that the file survives a power cut; slow for thousands of files.

    Yields:
        A temporary path beside it, with a name of its own. It is renamed to `path` when the block ends, and removed
        when the block raises.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    with _replace_at_end(Path(name), path, durable=durable) as part:
        yield part
        part.chmod(0o644)  # mkstemp's files are private


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Write a file of a run atomically and durably. One process writes; the temporary name is always the same.

    Args:
        path: the file to make or replace; its folder is made.
        write: receives the open binary file.

    Raises:
        CheckpointError: the disk is full, read-only or failing; `path` is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replace_at_end(path.with_name(f".{path.name}.writing"), path) as part, part.open("wb") as file:
            write(file)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a failed write
        raise CheckpointError(f"{path} cannot be written ({_cause(error)}); {_consequence(path.parent)}") from error


def check_writable(folder: Path) -> None:
    """Make a folder and check that it can be written.

    Raises:
        CheckpointError: it cannot.
    """
    probe = folder / ".probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({_cause(error)}); name another folder with process.work_dir=FOLDER."
        ) from error


def explain_write_error(error: OSError, folder: Path) -> CheckpointError | None:
    """The CheckpointError to raise for a failed write of logs or images; None for any other error."""
    if error.errno not in _CANNOT_WRITE:
        return None
    return CheckpointError(f"{folder} cannot be written ({_cause(error)}); {_consequence(folder)}")


@contextmanager
def _replace_at_end(part: Path, path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Rename `part` to `path` when the block ends; remove it when the block raises."""
    try:
        yield part
        if durable:
            _sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    if durable:
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> str:
    """The system's message; torch.save wraps it in an error of its own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno:
            return os.strerror(seen.errno)
        seen = seen.__cause__ or seen.__context__
    return str(error).strip().split("\n")[0][:120]


def _consequence(folder: Path) -> str:
    """Which state of the run can be resumed after the failed write."""
    if (folder / LAST).exists():
        return f"{LAST} holds the last good state: make room, then go on with --resume."
    return "no state was saved; make room, or name another folder with process.work_dir=FOLDER."
