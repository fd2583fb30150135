"""Training on Lightning's Trainer: from a loaded config to the best weights of a run.

Notation: B clips a batch and process, T frames a clip, N = B * T.
"""

import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecision
from torch.utils.data import DataLoader

from dataloader.checks import check_data
from dataloader.data_module import AVSDataModule
from model import AVSModel, build_model
from model.avs_model import among_zeros, places
from utils.checkpoint import check_weights
from utils.checkpointing import (
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    BestWeights,
    RunCheckpoint,
    StopSignals,
    check_order,
    check_writable,
    explain_write_error,
    find_resumable,
    read_checkpoint,
    write_atomically,
)
from utils.errors import ConfigError, DataError, UserError
from utils.evaluation import BEST_FILES, SCALARS, Scores
from utils.feature_cache import FrozenFeatures
from utils.logging import METRICS_FILE, RunLog
from utils.losses import build_criterion
from utils.pictures import save_curves
from utils.progress import TrainingProgress
from utils.reproducibility import configure_torch, seed_everything, step_seed
from utils.runtime import rank
from utils.schedules import build_schedule

LOSSES = ("total", "iou_loss", "mix_loss", "balance_loss")
CONFIG_FILE = "config.py"
NONFINITE_FILE = "nonfinite.json"
FAULTS_SHOWN = 10
PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


class NonFiniteLossError(UserError):
    """The loss became infinite or not a number; the run stopped before taking the step."""


class AVSTraining(LightningModule):
    """One training and validation step, for all tasks.

    Args:
        model: from `model.build_model`.
        criterion: from `utils.losses.build_criterion`.
        scores: of the task.
        optimizer_cfg: `cfg.optimizer`.
        process: `cfg.process`.
        folder: of the run, where a step that is not finite is described.
    """

    def __init__(
        self,
        model: AVSModel,
        criterion: nn.Module,
        scores: Scores,
        *,
        optimizer_cfg: Mapping[str, Any],
        process: Mapping[str, Any],
        folder: Path,
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.scores = scores
        self.optimizer_cfg = optimizer_cfg
        self.process = process
        self.folder = folder
        self.embeddings: FrozenFeatures | None = None
        self.maps: FrozenFeatures | None = None
        self.val_scores: dict[str, float] = {}
        self.common_val_batches = 0
        self._losses: dict[str, Tensor] = {}
        self._frozen = False

    def setup(self, stage: str) -> None:
        """Freeze before the strategy looks at which parameters have gradients."""
        self._freeze(self.process["freeze_epochs"] > 0)

    def configure_optimizers(self) -> Any:
        """AdamW over everything that is ever trained.

        A frozen backbone's parameters are in it from the start. They get no gradient, and AdamW leaves parameters
        without gradient alone: they neither move nor decay, and no state is made for them.
        """
        options = {key: value for key, value in self.optimizer_cfg.items() if key != "type"}
        if self.process["lr_scaling"] == "linear":
            options["lr"] *= self.trainer.world_size
        self._freeze(False)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # One pass over all parameters; in fp16 it would unscale gradients itself, and clipping could not come before.
        optimizer = torch.optim.AdamW(trained, fused=self.process["precision"] != "16", **options)
        self._freeze(self._frozen_at(self.trainer.current_epoch))
        configured: dict[str, Any] = {"optimizer": optimizer}
        if self.process["lr_schedule"] is not None:
            configured["lr_scheduler"] = build_schedule(self.process["lr_schedule"], optimizer, self._total_steps())
        return configured

    def _total_steps(self) -> int:
        batches = len(self.trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        return math.ceil(batches / self.process["accumulate"]) * int(self.process["train_epochs"])

    def on_train_start(self) -> None:
        """Begin also within an epoch; with the weights in place, see what is to be computed only once."""
        self._begin_epoch()
        # A compiled model is compiled as a whole, VGGish included; a sharded one does not have its weights at hand.
        whole = not self.process["compile"] and not isinstance(self.trainer.strategy, FSDPStrategy)
        folder = Path(self.process["work_dir"])
        if self.process["cache_features"] and self.model.vggish.frozen and whole:
            self.embeddings = FrozenFeatures(self.model.vggish, folder / ".vggish_cache", in_memory=True)
        if self.process["cache_backbone"] and self._frozen and whole:
            self.maps = FrozenFeatures(self.model.backbone, folder / ".backbone_cache", in_memory=False)

    def on_train_epoch_start(self) -> None:
        """Freeze or train the backbone, and decide whether this epoch ends with a validation."""
        self._begin_epoch()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what this step draws."""
        torch.manual_seed(step_seed(self.process["seed"], self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The total loss of a batch.

        Raises:
            NonFiniteLossError: it is not finite, on this process or another.
        """
        labelled = places(batch["gt_temporal_mask_flag"].flatten())
        losses = self._losses_of(batch, self._forward(batch, labelled), labelled)
        self._losses = {name: value.detach() for name, value in losses.items()}
        self._stop_if_not_finite(batch, batch_idx)
        return losses["total"] * self._share_of_step(batch_idx)

    def on_after_backward(self) -> None:
        """Average the running statistics of batch normalisation that does not do so itself, as on CPUs."""
        buffers = self._local_statistics()
        if self.trainer.world_size == 1 or not buffers:
            return
        mean = self._across_processes(torch.cat([x.flatten() for x in buffers]), "SUM") / self.trainer.world_size
        for buffer, shared in zip(buffers, mean.split([x.numel() for x in buffers]), strict=True):
            buffer.copy_(shared.view_as(buffer))

    def on_validation_epoch_start(self) -> None:
        """Start the scores anew, also where an interrupted validation is done again."""
        self.scores.reset()
        batches = self.trainer.num_val_batches[0]
        self.common_val_batches = int(self._across_processes(torch.tensor(batches), "MIN"))
        if self.common_val_batches == 0:
            raise ConfigError("The val split has fewer batches than the run has processes: use fewer of them.")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score a batch."""
        real = places(batch["vid_temporal_mask_flag"].flatten())
        logits = among_zeros(self._forward(batch, real).logits.float(), real, batch["vid_temporal_mask_flag"].numel())
        loader: Any = self.trainer.val_dataloaders
        place = batch_idx * self.trainer.world_size + self.global_rank
        first_clip = place * loader.batch_sampler.batch_size
        self.scores.update(logits, batch, first_clip)

    def on_validation_epoch_end(self) -> None:
        """The scores of the whole split, the same on all processes."""
        self.val_scores = self.scores.scalars()

    def last_losses(self) -> dict[str, float]:
        """Weighted loss parts of the last training step on this process."""
        return {name: float(value) for name, value in self._losses.items()}

    def shared_losses(self) -> dict[str, float]:
        """The same, averaged over the processes."""
        stacked = torch.stack([self._losses[name].float() for name in LOSSES])
        mean = self._across_processes(stacked, "SUM") / self.trainer.world_size
        return dict(zip(LOSSES, mean.tolist(), strict=True))

    def _forward(self, batch: dict[str, Any], answered: Tensor | None = None) -> Any:
        log_mel, frames = batch["log_mel"].flatten(0, 1), batch["frames"].flatten(0, 1)
        # Only avss pads its clips; elsewhere the flag would be a product with ones.
        real = batch["vid_temporal_mask_flag"].flatten() if self.scores.task == "avss" else None
        known: dict[str, Any] = {}
        if self.embeddings is not None:
            known["embedding"] = self.embeddings(batch["log_mel"])[0]
        if self.maps is not None and self._frozen:
            known["features"] = self.maps(batch["frames"])
        return self.model(log_mel, frames, real, answered, **known)

    def _losses_of(self, batch: dict[str, Any], out: Any, answered: Tensor | None) -> dict[str, Tensor]:
        masks, flag = batch["masks"].flatten(0, 1), batch["gt_temporal_mask_flag"].flatten()
        losses: dict[str, Tensor] = (
            self.criterion(out, masks, flag) if answered is None else self.criterion(out, masks[answered])
        )
        return losses

    def _share_of_step(self, batch_idx: int) -> float:
        """Lightning divides each batch's loss by `accumulate`; an epoch's last step may have fewer batches."""
        accumulate, batches = self.process["accumulate"], self.trainer.num_training_batches
        return float(accumulate / min(accumulate, batches - batch_idx // accumulate * accumulate))

    def _local_statistics(self) -> list[Tensor]:
        return [
            statistic
            for module in self.model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
            for statistic in (module.running_mean, module.running_var)
            if statistic is not None
        ]

    def _begin_epoch(self) -> None:
        epoch, trainer = self.current_epoch, self.trainer
        frozen = self._frozen_at(epoch)
        if frozen != self._frozen:
            self._freeze(frozen)
            if isinstance(trainer.strategy, DDPStrategy):
                # DistributedDataParallel exchanges the gradients of those parameters that had one when it was made.
                trainer.strategy.model = self
                trainer.strategy.configure_ddp()
        trainer.limit_val_batches = 1.0 if evaluates(self.process, epoch) else 0

    def _frozen_at(self, epoch: int) -> bool:
        return epoch < self.process["freeze_epochs"]

    def _freeze(self, freeze: bool) -> None:
        self.model.freeze_backbone(freeze)
        self._frozen = freeze

    def _stop_if_not_finite(self, batch: dict[str, Any], batch_idx: int) -> None:
        broken = ~torch.isfinite(torch.stack([self._losses[name] for name in LOSSES])).all()
        if not bool(self._across_processes(broken.int(), "MAX")):
            return
        report = {
            "epoch": self.current_epoch,
            "batch": batch_idx,
            "step": self.global_step,
            "process": self.global_rank,
            "clips": list(batch["name"]),
            "losses": {name: repr(value) for name, value in self.last_losses().items()},
        }
        path = self.folder / (f"nonfinite_{self.global_rank}.json" if self.trainer.world_size > 1 else NONFINITE_FILE)
        path.write_text(json.dumps(report, indent=2) + "\n")
        parts = ", ".join(f"{name} {value}" for name, value in self.last_losses().items())
        raise NonFiniteLossError(
            f"the loss of step {self.global_step} is not finite ({parts}; clips {', '.join(batch['name'])}), on this "
            f"process or another; described in {path}. A lower optimizer.lr, process.clip_grad_norm=1 or "
            "process.precision=32 help; process.detect_anomaly=True names the operation."
        )

    def _across_processes(self, value: Tensor, operation: str) -> Tensor:
        if self.trainer.world_size > 1:
            value = value.to(self.device)
            torch.distributed.all_reduce(value, getattr(torch.distributed.ReduceOp, operation))
        return value


class RunLogger(Callback):
    """Rows of losses and scores, and the curves drawn of them each epoch.

    Args:
        log: open on the main process, None on the others.
        folder: of the run.
        interval: optimizer steps between rows.
        accumulate: batches an optimizer step.
        title: of the curves.
    """

    def __init__(self, log: RunLog | None, folder: Path, *, interval: int, accumulate: int, title: str) -> None:
        self.record = log
        self.folder = folder
        self.interval = interval
        self.accumulate = accumulate
        self.title = title

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the losses of a step."""
        assert isinstance(pl_module, AVSTraining)
        stepped = (batch_idx + 1) % self.accumulate == 0 or batch_idx + 1 == trainer.num_training_batches
        if not stepped or trainer.global_step % self.interval:
            return
        losses = pl_module.shared_losses()
        if self.record is not None:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self._add(trainer, {"lr": float(rate), **{f"train_{name}": value for name, value in losses.items()}})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scores of an epoch."""
        assert isinstance(pl_module, AVSTraining)
        if self.record is not None:
            self._add(trainer, {f"val_{name}": value for name, value in pl_module.val_scores.items()})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves."""
        if self.record is not None:
            self.record.flush()
            if self.record.csv.path.exists():
                save_curves(self.record.csv.path, self.folder / "curves.png", title=self.title)

    def _add(self, trainer: Trainer, values: dict[str, float]) -> None:
        assert self.record is not None
        self.record.add({"epoch": trainer.current_epoch, "step": trainer.global_step, **values})


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
    log = None
    if rank() == 0:
        # Deleted and written by the main process alone, and only once data and model are known to fit.
        if overwrite:
            empty(folder)
        write_atomically(folder / CONFIG_FILE, lambda file: file.write(str(cfg.pretty_text).encode()))
        log = open_log(cfg.task, folder, position if found else None)
    trainer = build_trainer(
        process,
        folder,
        callbacks=[
            RunLogger(log, folder, interval=process.log_interval, accumulate=process.accumulate, title=name),
            TrainingProgress(console),
            best,
            RunCheckpoint(folder, interval=process.checkpoint_interval, order=order, signals=signals),
        ],
    )
    console.print(describe(cfg, module, data, trainer, folder, position))
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(found[0]) if found else None)
    finally:
        if log is not None:
            log.close()
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
            f"the data has {len(faults)} fault{'s' if len(faults) > 1 else ''} (scripts/check_data.py "
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


def check_classes(cfg: Any) -> None:
    """See that the model answers in the classes that the data has, for clips of its length.

    Raises:
        ConfigError: it does not.
    """
    classes = cfg.model.get("head", {}).get("num_classes", 1)
    for name, split in cfg.dataset.items():
        expected = split.get("num_class", 71) if cfg.task == "avss" else 1
        if classes != expected:
            raise ConfigError(f"model.head.num_classes={classes}, but dataset.{name} has {expected} classes.")
        frames = split.get("mask_num", 10) if cfg.task == "avss" else split.get("frames_per_clip", 5)
        if cfg.model.get("T", 5) != frames:
            raise ConfigError(f"model.T={cfg.model.get('T', 5)}, but clips of dataset.{name} have {frames} frames.")


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


def check_precision(precision: str, device: str) -> str:
    """Lightning's name of a precision.

    Raises:
        ConfigError: the device cannot do it.
    """
    if precision == "16" and device == "cpu":
        raise ConfigError("process.precision=16 needs a GPU; bf16 runs on a CPU as well.")
    return PRECISIONS[precision]


def build_trainer(process: Mapping[str, Any], folder: Path, callbacks: list[Callback]) -> Trainer:
    """Lightning's Trainer as `cfg.process` and the launcher's environment describe it.

    Raises:
        ConfigError: the machine lacks what is asked for.
    """
    if process["strategy"] == "fsdp" and process["clip_grad_norm"] is not None:
        raise ConfigError("process.strategy='fsdp' cannot limit the gradient's norm: set process.clip_grad_norm=None.")
    kind = accelerator()
    precision = check_precision(process["precision"], "cuda" if kind == "gpu" else "cpu")
    devices, num_nodes = processes(process, kind)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect() and "TORCHELASTIC_RUN_ID" not in os.environ:
        # Lightning would write a checkpoint of its own, in a place and a way of its own.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    try:
        return Trainer(
            accelerator=kind,
            devices=devices,
            num_nodes=num_nodes,
            strategy=build_strategy(str(process["strategy"]), kind, devices * num_nodes),
            precision=precision,  # type: ignore[arg-type]
            max_epochs=process["train_epochs"],
            accumulate_grad_batches=process["accumulate"],
            gradient_clip_val=process["clip_grad_norm"],
            sync_batchnorm=bool(process["sync_batchnorm"]) and kind == "gpu" and devices * num_nodes > 1,
            detect_anomaly=process["detect_anomaly"],
            default_root_dir=str(folder),
            callbacks=callbacks,
            plugins=plugins,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
    except (ValueError, MisconfigurationException) as error:
        wanted = ", ".join(f"process.{key}={process[key]!r}" for key in ("strategy", "devices", "num_nodes"))
        raise ConfigError(f"{wanted} cannot be had on this machine: {error}") from error


def accelerator() -> str:
    """Lightning's name of what this machine computes on."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def processes(process: Mapping[str, Any], accelerator: str) -> tuple[int, int]:
    """Processes on this machine and number of machines: torchrun's or SLURM's where one of them started this one."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        return int(environment["LOCAL_WORLD_SIZE"]), int(environment["GROUP_WORLD_SIZE"])
    if SLURMEnvironment.detect():
        nodes = int(environment.get("SLURM_NNODES", 1))
        return int(environment["SLURM_NTASKS"]) // nodes, nodes
    devices = process["devices"]
    if devices == "auto":
        devices = torch.cuda.device_count() if accelerator == "gpu" else 1
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ConfigError(f"process.devices={devices!r}: give 'auto' or a number of processes a machine, 1 or more.")
    return devices, int(process["num_nodes"])


def build_strategy(name: str, accelerator: str, world_size: int) -> str | Strategy:
    """How processes share the work: none alone, else 'ddp' (also by 'auto') or 'fsdp'; other names go to Lightning."""
    if name in ("auto", "ddp"):
        if world_size == 1:
            return "auto"
        return DDPStrategy(
            process_group_backend="nccl" if accelerator == "gpu" else "gloo",
            # Buffers are the same everywhere (for running statistics see AVSTraining.on_after_backward), and exchanging
            # them at each forward would hang where processes have different numbers of validation batches.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    if name == "fsdp":
        # Autocast alone lowers the precision, as elsewhere: the router, norms and pictures stay in float32.
        return FSDPStrategy(state_dict_type="full", mixed_precision=MixedPrecision())
    return name


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


def evaluates(process: Mapping[str, Any], epoch: int) -> bool:
    """Whether an epoch ends with a validation: every `eval_interval` from `start_eval_epoch` on, and the last."""
    since = epoch - process["start_eval_epoch"]
    return (since >= 0 and since % process["eval_interval"] == 0) or epoch == process["train_epochs"] - 1


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


__all__ = ["AVSTraining", "build_module", "build_trainer", "train"]
