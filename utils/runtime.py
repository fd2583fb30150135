"""Common to all entry points: paths, errors of the user, data made on demand. Imports nothing heavy."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import stamps_note
from utils.avsbench import missing_data
from utils.errors import ConfigError, DataError, UserError

ROOT = Path(__file__).resolve().parents[1]
USER_ERROR = 2
INTERRUPTED = 130

# Keys of a split's config that name its table; where the table is missing, so is the data.
TABLE_KEYS = ("anno_csv", "meta_csv_path")


class StopRequested(Exception):
    """SIGTERM or Ctrl-C: the state is saved and the run ends.

    Args:
        signal_number: what was received.
        saved: the checkpoint that holds the state, if any was written.
    """

    def __init__(self, signal_number: int, saved: Path | None) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number = signal_number
        self.saved = saved


def run(main: Callable[[], int | None]) -> None:
    """Run an entry point and exit with its status; an error of the user becomes one line and status 2."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    except StopRequested as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        where = f"the run is saved in {stop.saved}; go on with --resume" if stop.saved else "nothing was saved"
        if rank() == 0:
            print(f"\nstopped by signal {stop.signal_number}: {where}", file=sys.stderr, flush=True)
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process is ending; another Ctrl-C would interrupt that
        print("\nstopped by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # `python train.py ... | head`: the reader has closed the pipe; closing stdout would raise once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def find_file(name: str, what: str) -> Path:
    """A file named on the command line, relative to the working directory or else to the project.

    Raises:
        ConfigError: there is no such file in either.
    """
    for candidate in (Path(name), ROOT / name):
        if candidate.is_file():
            return candidate.resolve()
    raise ConfigError(f"{what} {name} does not exist (looked in {Path.cwd()} and {ROOT}).")


def find_checkpoint(name: str) -> Path:
    """Weights named on the command line: a file, or one of the packed models in model/packed/ by its name.

    Raises:
        ConfigError: there is neither.
    """
    shipped = ROOT / "model" / "packed" / f"{name}.safetensors"
    if "/" not in name and not Path(name).is_file() and shipped.is_file():
        return shipped
    try:
        return find_file(name, "the checkpoint")
    except ConfigError as error:
        known = ", ".join(sorted(path.stem for path in shipped.parent.glob("*.safetensors"))) or "none"
        raise ConfigError(f"{error} Models that come with the project: {known}.") from error


def shipped_configs() -> list[str]:
    """All configs but the bases, as paths relative to the project."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "config").rglob("*.py") if "_base_" not in path.parts)


def rank() -> int:
    """Rank of this process, from the launcher's environment; 0 for a single process."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return 0


def warn(message: str) -> None:
    """Print a warning, on the first process alone."""
    if rank() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, made where it is missing; other processes wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def tables(cfg: Any) -> list[Path]:
    """Tables of clips that the splits of a config name."""
    splits = [split for split in cfg["dataset"].values() if isinstance(split, Mapping)]
    names = [split[key] for split in splits for key in TABLE_KEYS if key in split]
    return [Path(name) for name in dict.fromkeys(map(str, names))]


def missing_tables(cfg: Any) -> list[Path]:
    """Those of them that do not exist."""
    return [table for table in tables(cfg) if not table.is_file()]


def ensure_data(cfg: Any, config_path: Path, *, extend: bool = False) -> None:
    """Make the stamps data that a config describes in `stamps`, if its table is missing.

    Of several processes, one makes it and the others wait.

    Args:
        cfg: the config.
        config_path: its file, for messages.
        extend: also extend data of an earlier version, which lacks the split `unseen`.

    Raises:
        DataError: scripts/data/make_stamps.py failed (its output is above), the data was made with other options, or
            a table of other data is missing.
    """
    options = cfg.get("stamps")
    if not options:
        if missing := missing_tables(cfg):
            raise DataError(missing_data(cfg["task"], cfg["dataset"]["train"], missing[0]))
        return
    if not missing_tables(cfg):
        refuse_other_stamps(cfg, options)
        if not (extend and _extensible(cfg)):
            return
    with file_lock(ROOT / "data" / ".stamps.lock"):
        if not missing_tables(cfg) and not (extend and _extensible(cfg)):
            return
        command = [sys.executable, str(ROOT / "scripts/data/make_stamps.py"), *as_arguments(options)]
        print(f"data: {config_path.name} needs stamps data; making it: {' '.join(command[1:])}", flush=True)
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            raise DataError(f"scripts/data/make_stamps.py ended with status {status}; its output is above.")
        if lacking := missing_tables(cfg):
            raise DataError(
                f"scripts/data/make_stamps.py ran and {lacking[0]} is still missing: see `stamps` in {config_path}."
            )


def _extensible(cfg: Any) -> bool:
    notes = [stamps_note.read_note(folder) for folder in {table.parent for table in tables(cfg)}]
    return any(made is not None and stamps_note.is_extensible(made) for made in notes)


def refuse_other_stamps(cfg: Any, options: Mapping[str, Any]) -> None:
    """Check that the stamps data was made with the config's options.

    Raises:
        DataError: it was made with others.
    """
    for folder in {table.parent for table in tables(cfg)}:
        made = stamps_note.read_note(folder)
        if made is not None and (differing := stamps_note.difference(made, options)):
            key, value, wanted = differing
            raise DataError(
                f"the data in {folder} was made with {key}={value}, and the config says stamps.{key}={wanted}: "
                f"remove that folder, and it is made anew."
            )


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Command-line arguments of a dictionary: `{'train_clips': 9, 'drawn': True}` -> --train-clips 9 --drawn."""
    arguments: list[str] = []
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            arguments.append(flag)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            arguments += [flag, *map(str, value)]
        elif value is not None and value is not False:
            arguments += [flag, str(value)]
    return arguments
