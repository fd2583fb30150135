"""Training on Lightning's Trainer: from a loaded config to the best weights of a run."""

import logging
import math
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from dataloader.data_module import AVSDataModule
from dataloader.preflight import check_data
from model import build_model
from model.checkpoint import check_weights
from model.criterion import build_criterion
from scripts.engine.devices import accelerator, build_trainer, processes
from scripts.engine.evaluation import BEST_FILES, SCALARS, Scores
from scripts.engine.logging import METRICS_FILE, RunLog, RunLogger
from scripts.engine.loop import LOSSES, AVSTraining
from scripts.engine.progress import TrainingProgress
from scripts.engine.resume import (
    LAST,
    PREVIOUS,
    BestWeights,
    RunCheckpoint,
    StopSignals,
    check_order,
    find_resumable,
    read_checkpoint,
)
from utils.config import check_classes
from utils.errors import ConfigError, DataError
from utils.files import check_writable, explain_write_error, write_atomically
from utils.reproducibility import configure_torch, seed_everything
from utils.runtime import rank

CONFIG_FILE = "config.py"
FAULTS_SHOWN = 10


class RunData(AVSDataModule):
    """The data module, started where a run goes on.

    Args:
        cfg: the loaded config.
        epoch: to start with.
        batch: of that epoch to start with.
    """

    def __init__(self, cfg: Mapping[str, Any], *, epoch: int = 0, batch: int = 0) -> None:
        super().__init__(cfg)
        self._start = (epoch, batch)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Shuffled anew each epoch; the first one from where the run stood."""
        loader = super().train_dataloader()
        batches: Any = loader.batch_sampler
        if len(batches) == 0:
            raise DataError(
                "The train split has no whole batch: lower dataset.train.batch_size, or process.drop_last=False."
            )
        batches.set_epoch(self._start[0])
        batches.skip(self._start[1])
        return loader


def train(cfg: Any, name: str, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train a config's model.

    Args:
        cfg: from `utils.config.load_config`.
        name: of the config; the run's folder is `process.work_dir`/name.
        resume: go on from the run's last checkpoint, or start where there is none.
        overwrite: delete the run that the folder holds.

    Returns:
        The run's folder.

    Raises:
        UserError: the config, the data or the folder cannot be used.
        StopRequested: a signal ended the run; its state is saved.
    """
    folder = Path(cfg.process.work_dir) / name
    try:
        return _train(cfg, name, folder, resume=resume, overwrite=overwrite)
    except OSError as error:
        explained = explain_write_error(error, folder)
        if explained is None:
            raise
        raise explained from error


def _train(cfg: Any, name: str, folder: Path, *, resume: bool, overwrite: bool) -> Path:
    process = cfg.process
    console = Console(soft_wrap=True, highlight=False, quiet=rank() != 0)
    quiet_lightning()
    if rank() == 0:
        prepare_folder(folder, best=BEST_FILES[cfg.task], resume=resume, overwrite=overwrite)
        if process.check_data:
            refuse_broken_data(cfg)
    found = find_resumable(folder, console.print) if resume else None
    if resume and found is None:
        console.print(f"{folder} holds no checkpoint yet: starting from the beginning")
    position = found[1] if found else {"epoch": 0, "batch": 0, "step": 0, "validation_pending": False}

    configure_torch(process)
    seed_everything(process.seed)
    check_classes(cfg)
    check_optimizer(cfg.optimizer, process.clip_grad_norm)
    data = RunData(cfg, epoch=position["epoch"], batch=position["batch"])
    data.setup("fit")
    module = build_module(cfg, data.dataset("train").num_classes, folder)
    order = {
        "dataset.train.batch_size": data.dataset("train").batch_size,
        "process.accumulate": process.accumulate,
        "process.seed": process.seed,
        "the number of processes": math.prod(processes(process, accelerator())),
    }
    if found:
        check_order(position, order)
        check_weights(read_checkpoint(found[0])["state_dict"], module.state_dict(), str(found[0]))
    signals, best = StopSignals(), BestWeights(folder, BEST_FILES[cfg.task])
    logger = RunLogger(folder, interval=process.log_interval, accumulate=process.accumulate, title=name)
    trainer = build_trainer(
        process,
        folder,
        callbacks=[
            logger,
            TrainingProgress(console),
            best,
            RunCheckpoint(folder, interval=process.checkpoint_interval, order=order, signals=signals),
        ],
    )
    if rank() == 0:
        # Deleted and written by the main process alone, and only once data, model and machine are known to fit.
        if overwrite:
            empty(folder)
        write_atomically(folder / CONFIG_FILE, lambda file: file.write(str(cfg.pretty_text).encode()))
        logger.record = open_log(cfg.task, folder, position if found else None)
    console.print(describe(cfg, module, data, trainer, folder, position))
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(found[0]) if found else None)
    finally:
        if logger.record is not None:
            logger.record.close()
    report(folder, best, console)
    return folder


def refuse_broken_data(cfg: Any) -> None:
    """Look at every file of the data before anything is trained; what was good and has not changed is not read again.

    Raises:
        DataError: a file is missing, broken, or not what its table says.
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
    """Leave out Lightning's remarks on what this project has decided; its warnings stay, but for those."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*dataloader is not resumable.*",  # RunData starts it where it has to
        ".*module\\(s\\) in eval mode.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def build_module(cfg: Any, num_classes: int, folder: Path) -> AVSTraining:
    """Model, criterion and scores of a config.

    Args:
        cfg: the loaded config.
        num_classes: of the data set.
        folder: of the run.

    Raises:
        ConfigError: the model cannot be built.
    """
    model = build_model(cfg.model)
    model.set_activation_checkpointing(bool(cfg.process.activation_checkpointing))
    if cfg.process.compile:
        model.compile()
    return AVSTraining(
        model,
        build_criterion(cfg.loss, num_classes),
        Scores(cfg.task, num_classes),
        optimizer_cfg=cfg.optimizer,
        process=cfg.process,
        folder=folder,
    )


def check_optimizer(options: Mapping[str, Any], clip_grad_norm: Any) -> None:
    """See that AdamW takes its options, before data and model are built.

    Raises:
        ConfigError: it does not, or the limit of the gradient's norm is no positive number.
    """
    try:
        torch.optim.AdamW([nn.Parameter(torch.zeros(1))], **{key: options[key] for key in options if key != "type"})
    except (TypeError, ValueError) as error:
        given = ", ".join(f"optimizer.{key}={value!r}" for key, value in options.items())
        raise ConfigError(f"The optimizer cannot be built of {given}: {error}.") from error
    number = isinstance(clip_grad_norm, int | float) and not isinstance(clip_grad_norm, bool)
    if clip_grad_norm is not None and not (number and clip_grad_norm > 0):
        raise ConfigError(f"process.clip_grad_norm={clip_grad_norm!r}: give None or a number above 0.")


def prepare_folder(folder: Path, *, best: Iterable[str], resume: bool, overwrite: bool) -> None:
    """Make the run's folder; refuse one that holds a run, unless told what to do with it.

    Args:
        folder: of the run.
        best: names of the weights that the run will keep.
        resume: a run there is to go on.
        overwrite: a run there may be deleted.

    Raises:
        ConfigError: it holds a run, or both ways out were asked for.
        CheckpointError: it cannot be written.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other.")
    used = [name for name in (LAST, PREVIOUS, METRICS_FILE, *best) if (folder / name).exists()]
    if used and not (resume or overwrite):
        raise ConfigError(
            f"{folder} already holds a run ({', '.join(used)}): go on with --resume, start anew with --overwrite, "
            "or name another folder with process.work_dir=FOLDER."
        )
    check_writable(folder)


def empty(folder: Path) -> None:
    """Delete all that a folder holds."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def open_log(task: str, folder: Path, position: Mapping[str, Any] | None) -> RunLog:
    """The run's log, cut back to where the run stands."""
    columns = ["epoch", "step", "lr", *(f"train_{name}" for name in LOSSES), *(f"val_{name}" for name in SCALARS[task])]
    if position is None:
        return RunLog(folder, columns)
    return RunLog(
        folder, columns, resume_step=position["step"], validation_pending=bool(position["validation_pending"])
    )


def describe(
    cfg: Any, module: AVSTraining, data: RunData, trainer: Trainer, folder: Path, position: Mapping[str, Any]
) -> str:
    """What is about to be trained, on what and where."""
    parameters = sum(parameter.numel() for parameter in module.model.parameters())
    where = f"{trainer.world_size} process{'es' if trainer.world_size > 1 else ''} ({trainer.accelerator.name()})"
    lines = [
        f"{cfg.task}: {len(data.dataset('train'))} clips to train on, {len(data.dataset('val'))} to validate",
        f"model: {parameters / 1e6:.1f} M parameters, {where}, precision {cfg.process.precision}",
        f"run: {folder}",
    ]
    if position["step"]:
        lines.append(f"going on at epoch {position['epoch'] + 1}, batch {position['batch']}, step {position['step']}")
    return "\n".join(lines)


def report(folder: Path, best: BestWeights, console: Console) -> None:
    """Say what came out."""
    for name, found in best.best.items():
        console.print(f"{folder / name}: epoch {int(found['epoch']) + 1}, score {found['score']:.4f}")
