"""Files that are either whole or not there, and what is said where they cannot be written."""

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
    """Write a file so that no reader ever sees half of it, whatever happens to the writer.

    Args:
        path: where the file goes; its folder is made.
        durable: wait until the disk has it, so that it survives a power cut too; slow for thousands of files.

    Yields:
        A path beside it to write to. When the block ends, it is renamed to `path`; when the block
        raises, it is removed and `path` stays as it was.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        if durable:
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut.

    Args:
        path: the file to make or replace.
        write: receives the open binary file.

    Raises:
        CheckpointError: the disk is full, read-only or otherwise refuses; what was at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save turns a failed write into a RuntimeError of its own.
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written ({_cause(error)}); {_consequence(path.parent)}") from error


def check_writable(folder: Path) -> None:
    """Make a folder and see that files can be made in it.

    Raises:
        CheckpointError: it cannot be written.
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
    """The user's error behind a failed write of logs or pictures; None where the error is something else."""
    if error.errno not in _CANNOT_WRITE:
        return None
    return CheckpointError(f"{folder} cannot be written ({_cause(error)}); {_consequence(folder)}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> str:
    """The system's words; torch.save hides them behind its own error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno:
            return os.strerror(seen.errno)
        seen = seen.__cause__ or seen.__context__
    return str(error).strip().split("\n")[0][:120]


def _consequence(folder: Path) -> str:
    """What is left of a run in whose folder a file cannot be written."""
    if (folder / LAST).exists():
        return f"{LAST} holds the last good state: make room, then go on with --resume."
    return "no state was saved; make room, or name another folder with process.work_dir=FOLDER."
