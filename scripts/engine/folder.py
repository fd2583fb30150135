"""Before and around a run: its folder, the check of its data, its log."""

import logging
import shutil
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dataloader.preflight import check_data
from scripts.engine.logging import METRICS_FILE, RunLog
from scripts.engine.plots import GRADIENT_NORM
from scripts.engine.provenance import plain
from scripts.engine.resume import PREVIOUS, Position
from scripts.engine.task_metrics import SCALARS
from utils.errors import ConfigError, DataError
from utils.files import LAST, check_writable
from utils.portable import portable

FAULTS_SHOWN = 10


def refuse_broken_data(cfg: Any) -> None:
    """Check every file of the data before training; files found good before and unchanged since are not read again.

    Raises:
        DataError: a file is missing, broken, or contradicts its table.
    """
    faults = check_data(cfg).faults
    if faults:
        shown = "".join(f"\n  {fault}" for fault in faults[:FAULTS_SHOWN])
        more = f"\n  and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        raise DataError(
            f"the data has {len(faults)} fault{'s' if len(faults) > 1 else ''} (scripts/data/check_data.py "
            "--write-clean-csv makes tables without the bad clips; process.check_data=False trains all the same):"
            f"{shown}{more}"
        )


def quiet_lightning() -> None:
    """Leave out Lightning's remarks on what this project has decided."""
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")


def check_choice(*, resume: bool, overwrite: bool, init_from: object = None) -> None:
    """Check the options that say how a run begins.

    Raises:
        ConfigError: two that exclude each other.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other.")
    if resume and init_from is not None:
        raise ConfigError(
            "--resume and --init-from exclude each other: a resumed run goes on from its own last checkpoint."
        )


def prepare_folder(folder: Path, *, best: Iterable[str], resume: bool, overwrite: bool) -> None:
    """Make the run's folder; refuse one that holds a run, unless told what to do with it.

    Args:
        folder: of the run.
        best: names of the weights files that the run will keep.
        resume: the run is to go on.
        overwrite: the run may be deleted.

    Raises:
        ConfigError: it holds a run.
        CheckpointError: it cannot be written.
    """
    used = [name for name in (LAST, PREVIOUS, METRICS_FILE, *best) if (folder / name).exists()]
    if used and not (resume or overwrite):
        raise ConfigError(
            f"{folder} already holds a run ({', '.join(used)}): go on with --resume, start anew with --overwrite, "
            "or name another folder with process.work_dir=FOLDER."
        )
    check_writable(folder)


def empty(folder: Path) -> None:
    """Delete everything in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def open_log(
    cfg: Any, folder: Path, position: Position, title: str, losses: Iterable[str], experts: Sequence[str]
) -> RunLog:
    """The run's log, cut back to where the run stands.

    Args:
        cfg: the whole config.
        folder: of the run.
        position: where it stands.
        title: of the curves.
        losses: names of the criterion's.
        experts: columns of the experts' load.
    """
    norm = [] if cfg.process.clip_grad_norm is None else [GRADIENT_NORM]
    scores = [f"val_{name}" for name in SCALARS[cfg.task]]
    columns = ["epoch", "step", "lr", *norm, *(f"train_{name}" for name in losses), *scores]
    started = position.step or position.epoch or position.batch
    return RunLog(
        folder,
        columns,
        experts=experts,
        title=title,
        logger=cfg.process.logger,
        config=portable(plain(cfg.to_dict())),  # others may see a service's pages
        resume_step=position.step if started else None,
        validation_pending=position.validation_pending,
    )
