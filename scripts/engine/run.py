"""A training run, from a loaded config to the best weights: set-up, epochs, validation, checkpoints."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataloader.data_module import DataModule
from model import build_model
from model.checkpoint import RECORD, check_weights
from model.criterion import build_criterion, criterion_names
from model.pretrained import fetch_missing, load_pretrained
from model.transfer import Transfer, initialise_from
from scripts.engine.agreed import AgreedSignal
from scripts.engine.audio_statistics import fit_audio_norm
from scripts.engine.empty_masks import unlearnable_negatives
from scripts.engine.expert_load import ExpertLoad
from scripts.engine.fabric import (
    accelerator,
    all_reduce,
    build_fabric,
    ends_with_this_process,
    full_states,
    full_weights,
    launch,
    load_optimizer,
    processes,
    run_precision,
    share_cores,
)
from scripts.engine.feature_cache import KnownFeatures, known_features
from scripts.engine.folder import check_choice, empty, open_log, prepare_folder, quiet_lightning, refuse_broken_data
from scripts.engine.logging import RunLog
from scripts.engine.loop import Batch, Losses, evaluate, evaluates, predictor, train_one_epoch
from scripts.engine.nonfinite import FiniteCheck, NonFiniteLossError
from scripts.engine.optimizer import build_optimizer, check_gradient_limit
from scripts.engine.plots import GRADIENT_NORM
from scripts.engine.progress import TrainingProgress
from scripts.engine.provenance import provenance
from scripts.engine.resume import (
    LAST,
    RUN_KEY,
    BestWeights,
    Position,
    StopSignals,
    check_order,
    find_resumable,
    save_checkpoint,
)
from scripts.engine.task_metrics import BEST_FILES, TaskMetrics
from scripts.engine.trackers import import_logger
from utils.config import check_classes
from utils.errors import ConfigError, DataError
from utils.files import explain_write_error, write_atomically
from utils.reproducibility import configure_torch, seed_everything
from utils.runtime import StopRequested, rank, warn
from utils.schedules import build_schedule

CONFIG_FILE = "config.py"
INIT_FILE = "init_from.txt"


def train(
    cfg: Any, name: str, *, resume: bool = False, overwrite: bool = False, init_from: str | Path | None = None
) -> Path:
    """Train a config's model.

    Args:
        cfg: from `utils.config.load_config`.
        name: of the config; the run's folder is `process.work_dir`/name.
        resume: go on from the run's last checkpoint, or start where there is none.
        overwrite: delete the run in the folder.
        init_from: weights of another run to start from, see `model.transfer.initialise_from`; what they were and what
            did not fit is written to `init_from.txt` in the run's folder.

    Returns:
        The run's folder.

    Raises:
        UserError: the config, the data or the folder cannot be used.
        StopRequested: a signal ended the run; its state is saved.
    """
    folder = Path(cfg.process.work_dir) / name
    check_choice(resume=resume, overwrite=overwrite, init_from=init_from)
    try:
        return _train(cfg, name, folder, resume=resume, overwrite=overwrite, init_from=init_from)
    except OSError as error:
        explained = explain_write_error(error, folder)
        if explained is None:
            raise
        raise explained from error


def _train(cfg: Any, name: str, folder: Path, *, resume: bool, overwrite: bool, init_from: str | Path | None) -> Path:
    console = Console(soft_wrap=True, highlight=False, quiet=rank() != 0)
    quiet_lightning()
    if rank() == 0:
        prepare_folder(folder, best=BEST_FILES[cfg.task], resume=resume, overwrite=overwrite)
        if cfg.process.check_data:
            refuse_broken_data(cfg)
    found = find_resumable(folder, console.print) if resume else None
    if resume and found is None:
        console.print(f"{folder} holds no checkpoint yet: starting from the beginning")
    run = Run(cfg, folder, found, init_from)
    if rank() == 0:
        # Deleted and written by the first process alone, and only once data, model and machine are known to fit.
        if overwrite:
            empty(folder)
        write_atomically(folder / CONFIG_FILE, lambda file: file.write(str(cfg.pretty_text).encode()))
        if (transfer := run.transfer) is not None:
            write_atomically(folder / INIT_FILE, lambda file: file.write(transfer.describe(names=None).encode()))
            console.print(transfer.describe(), markup=False)
    console.print(run.describe())
    run.fit(console, title=name)
    for file, best in run.best.best.items():
        console.print(f"{folder / file}: epoch {int(best['epoch']) + 1}, score {best['score']:.4f}")
    return folder


class Run:
    """Everything that a training run consists of.

    The constructor builds all parts and checks them against each other, in this process alone; `fit` starts the other
    processes, if any, and trains.

    Args:
        cfg: from `utils.config.load_config`.
        folder: of the run.
        found: path and contents of the checkpoint to go on from; None starts anew.
        init_from: weights of another run to start from, over the pretrained ones; None for none.

    Raises:
        UserError: the parts cannot be built, or do not fit together or the checkpoint.
    """

    def __init__(
        self,
        cfg: Any,
        folder: Path,
        found: tuple[Path, dict[str, Any]] | None = None,
        init_from: str | Path | None = None,
    ) -> None:
        self.cfg, self.process, self.folder = cfg, cfg.process, folder
        self.checkpoint = found[1] if found else None
        configure_torch(self.process)
        seed_everything(self.process.seed)
        check_classes(cfg)
        check_gradient_limit(self.process.clip_grad_norm)
        before = None if self.checkpoint is None else str(self.checkpoint[RUN_KEY]["precision"])
        self.process.precision = run_precision(self.process, before)
        self.fabric = build_fabric(self.process)
        import_logger(self.process.logger)
        self.data = DataModule(cfg)
        num_classes = self.data.dataset("train").num_classes
        self.data.dataset("val")
        self.metrics = TaskMetrics(cfg.task, num_classes)
        self.criterion = build_criterion(cfg.loss, num_classes)
        self.data.dataset("train").prepare()
        if message := unlearnable_negatives(self.data.dataset("train"), self.criterion):
            warn(message)
        self.model = build_model(cfg.model)
        if self.data.dataset("train").single_frames and any(
            getattr(m, "temporal", False) for m in self.model.modules()
        ):
            raise ConfigError("dataset.train.single_frames=True and av_fusion.temporal=True exclude each other.")
        build_optimizer(cfg.optimizer, self.model)  # its options are checked before anything is read
        order = {
            "dataset.train.batch_size": self.data.dataset("train").batch_size,
            "process.accumulate": self.process.accumulate,
            "process.seed": self.process.seed,
            "the number of processes": math.prod(processes(self.process, accelerator())),
        }
        self.position = Position(order=order, precision=self.process.precision)
        earlier = None if found is None else found[1].get(RECORD)
        self.record = provenance(cfg, self.data, earlier) if rank() == 0 else {}
        self.best = BestWeights(folder, BEST_FILES[cfg.task], self.record)
        self.transfer: Transfer | None = None
        if found is None:
            fetch_missing(cfg.model)
            load_pretrained(self.model, cfg.model)
            if init_from is not None:
                self.transfer = initialise_from(self.model, init_from)
        else:
            path, checkpoint = found
            check_order(checkpoint[RUN_KEY], order)
            check_weights(checkpoint["state_dict"], self.model.state_dict(), str(path))
            self.model.load_state_dict(checkpoint["state_dict"])
            self.position = Position(**{**checkpoint[RUN_KEY], "order": order, "precision": self.process.precision})
            self.best.best = checkpoint["best"]
        self.model.set_activation_checkpointing(bool(self.process.activation_checkpointing))
        self.signals = StopSignals()
        self.known = KnownFeatures()
        self.log: RunLog | None = None
        # A hook would break a compiled model into pieces.
        self.load = ExpertLoad(nn.Identity() if self.process.compile else self.model)

    def describe(self) -> str:
        """What is about to be trained, on what and where."""
        clips = {split: len(self.data.dataset(split)) for split in ("train", "val")}
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        world, kind, position = self.fabric.world_size, accelerator(), self.position
        lines = [
            f"{self.cfg.task}: {clips['train']} clips to train on, {clips['val']} to validate",
            f"model: {parameters / 1e6:.1f} M parameters, {world} process{'es' if world > 1 else ''} ({kind}), "
            f"precision {self.process.precision}",
            f"run: {self.folder}",
        ]
        if position.step:
            lines.append(f"going on at epoch {position.epoch + 1}, batch {position.batch}, step {position.step}")
        return "\n".join(lines)

    def fit(self, console: Console, *, title: str = "") -> None:
        """Train all epochs that are left."""
        launch(self.fabric)
        try:
            with ends_with_this_process(self.fabric, (NonFiniteLossError, StopRequested)):
                self._fit(console, title)
        finally:
            if self.log is not None:
                self.log.close()

    def _fit(self, console: Console, title: str) -> None:
        """`fit` in one of the processes."""
        share_cores(self.fabric, processes(self.process, accelerator())[0])
        train_loader, val_loader = self._loaders()
        self._set_up(batches=len(train_loader))
        if self.fabric.global_rank == 0:
            names, experts = criterion_names(self.criterion), self.load.columns
            self.log = open_log(self.cfg, self.folder, self.position, title, names, experts)
        quiet = self.fabric.global_rank != 0
        with TrainingProgress(self.process.train_epochs, console, quiet=quiet) as self.progress, self.signals:
            while self.position.epoch < self.process.train_epochs or self.position.validation_pending:
                if not self.position.validation_pending:
                    self._train_epoch(train_loader)
                self._finish_epoch(val_loader)

    def _set_up(self, batches: int) -> None:
        """Hand model and optimizer to Fabric, in the order that sharded strategies need."""
        process, fabric = self.process, self.fabric
        if process.sync_batchnorm and fabric.world_size > 1 and fabric.device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        torch.autograd.set_detect_anomaly(bool(process.detect_anomaly))
        if process.compile:
            self.model.compile(mode=None if process.compile is True else process.compile)
        self.finite = FiniteCheck(self.folder, fabric)
        self.stop = AgreedSignal(self.signals, fabric)
        self.metrics.to(fabric.device)
        self.criterion.to(fabric.device)
        # Frozen parameters are in the optimizer from the start: without a gradient they neither move nor decay.
        self.model.freeze_backbone(False)
        self.frozen = False
        self.wrapped = fabric.setup_module(self.model)
        optimizer = build_optimizer(
            self.cfg.optimizer,
            self.wrapped.module,
            lr_factor=fabric.world_size if process.lr_scaling == "linear" else 1.0,
            fused=process.precision != "16",  # in fp16 it would unscale gradients itself, after they are clipped
        )
        self.optimizer: Any = fabric.setup_optimizers(optimizer)
        self.schedule, self.schedule_interval = None, ""
        if process.lr_schedule is not None:
            steps = math.ceil(batches / process.accumulate) * int(process.train_epochs)
            self.schedule, self.schedule_interval = build_schedule(process.lr_schedule, optimizer, steps).values()
        if self.checkpoint is not None:  # its weights are in the model already
            load_optimizer(fabric, self.wrapped, self.optimizer, self.checkpoint)
            if self.schedule is not None and self.checkpoint["schedule"] is not None:
                self.schedule.load_state_dict(self.checkpoint["schedule"])
            fabric.strategy.precision.load_state_dict(self.checkpoint["precision"])
            self.checkpoint = None
        self._freeze(self.position.epoch < process.freeze_epochs)
        # A compiled model is compiled as a whole, audio encoder included; a sharded one is not complete anywhere.
        whole = not process.compile and not isinstance(fabric.strategy, FSDPStrategy)
        self.known = known_features(process, self.model, frozen_backbone=self.frozen) if whole else KnownFeatures()
        fit_audio_norm(self.model, self.data.dataset("train"), self.known.embeddings, fabric)

    def _loaders(self) -> tuple[DataLoader[Batch], DataLoader[Batch]]:
        self.data.rank, self.data.world_size = self.fabric.global_rank, self.fabric.world_size
        train_loader, val_loader = self.data.loader("train", shuffle=True), self.data.loader("val")
        if len(train_loader) == 0:
            raise DataError(
                "The train split has no whole batch: lower dataset.train.batch_size, or process.drop_last=False."
            )
        self.common_val_batches = int(all_reduce(torch.tensor(len(val_loader)), "MIN", self.fabric))
        if self.common_val_batches == 0:
            raise ConfigError("The val split has fewer batches than the run has processes: use fewer of them.")
        return train_loader, val_loader

    def _train_epoch(self, loader: DataLoader[Batch]) -> None:
        position, schedule = self.position, self.schedule
        self._freeze(position.epoch < self.process.freeze_epochs)
        sampler: Any = loader.batch_sampler
        sampler.set_epoch(position.epoch)
        sampler.skip(position.batch)
        self.progress.begin_training()
        self._watch_experts()
        train_one_epoch(
            self.wrapped,
            self.criterion,
            loader,
            self.optimizer,
            fabric=self.fabric,
            position=position,
            process=self.process,
            schedule=schedule if self.schedule_interval == "step" else None,
            known=self.known,
            on_loss=partial(self.finite.add, position=position),
            on_batch=lambda *given: self._after_batch(*given, batches=len(loader)),
        )
        if schedule is not None and self.schedule_interval == "epoch":
            schedule.step()
        self.finite.finish()
        position.epoch, position.batch = position.epoch + 1, 0

    def _finish_epoch(self, loader: DataLoader[Batch]) -> None:
        """Validate where the epoch asks for it, and save."""
        epoch, position = self.position.epoch - 1, self.position
        if evaluates(self.process, epoch):
            position.validation_pending = True
            fabric = self.fabric

            def after_batch(index: int, batch: Batch, logits: Tensor, first_clip: int) -> None:
                self.progress.validate(epoch, index + 1, len(loader))
                # Processes may differ by one batch; they can agree only where all of them have one.
                if index < self.common_val_batches and (stopped := self.stop.ask()):
                    self._save()
                    self._stop(stopped)

            predict = predictor(self.wrapped, fabric.device, self.known)
            ranks = {"rank": fabric.global_rank, "world_size": fabric.world_size}
            scores = evaluate(predict, loader, self.metrics, on_batch=after_batch, **ranks)
            position.validation_pending = False
            self.progress.scores(epoch, scores)
            self._record(epoch, {f"val_{name}": value for name, value in scores.items()})
            weights = partial(full_weights, fabric, self.wrapped)
            self.best.update(scores, epoch, weights, write=fabric.global_rank == 0)
        if self.log is not None:
            self.log.end_epoch(self.position.step)
        self._save()
        if stopped := self.stop.now():
            self._stop(stopped)

    def _after_batch(
        self, losses: Losses, batch: Batch, stepped: bool, gradient_norm: Tensor | None, *, batches: int
    ) -> None:
        """Log, show and save within an epoch. After its last batch, validation or the end of the epoch comes first."""
        position, process = self.position, self.process
        if stepped and position.step % process.log_interval == 0:
            names = criterion_names(self.criterion)
            stacked = torch.stack([losses[name].float() for name in names])
            mean = all_reduce(stacked, "SUM", self.fabric) / self.fabric.world_size
            rate = float(self.optimizer.param_groups[0]["lr"])
            parts = {f"train_{name}": value for name, value in zip(names, mean.tolist(), strict=True)}
            norm = {} if gradient_norm is None else {GRADIENT_NORM: float(gradient_norm)}
            self._record(position.epoch, {"lr": rate, **norm, **parts})
            if self.log is not None and (load := self.load.read()):
                self.log.add_experts({"epoch": position.epoch, "step": position.step, **load})
        if stepped:
            self._watch_experts()
        clips = len(batch["name"]) * self.fabric.world_size
        self.progress.train(position.epoch, position.batch, batches, clips, losses)
        if stepped and position.batch < batches:
            due = process.checkpoint_interval and position.step % process.checkpoint_interval == 0
            stopped = self.stop.ask()
            if due or stopped:
                self._save()
            if stopped:
                self._stop(stopped)

    def _watch_experts(self) -> None:
        """Let the load of the experts be read in the next step, if that is logged."""
        if self.log is not None and (self.position.step + 1) % self.process.log_interval == 0:
            self.load.watch()

    def _record(self, epoch: int, values: Mapping[str, float]) -> None:
        if self.log is not None:
            self.log.add({"epoch": epoch, "step": self.position.step, **values})

    def _freeze(self, freeze: bool) -> None:
        if freeze == self.frozen:
            return
        self.frozen = freeze
        self.model.freeze_backbone(freeze)
        if not freeze:
            self.known = KnownFeatures(self.known.embeddings)
        if isinstance(self.fabric.strategy, DDPStrategy):
            # DistributedDataParallel exchanges the gradients of the parameters that had one when it was made.
            self.wrapped = self.fabric.setup_module(self.model)

    def _stop(self, number: int) -> NoReturn:
        """End on all processes at once: a launcher may kill the first, which writes the state, when another ends."""
        self.fabric.barrier()
        raise StopRequested(number, self.folder / LAST)

    def _save(self) -> None:
        self.finite.finish()
        weights, optimizer = full_states(self.fabric, self.wrapped, self.optimizer)
        checkpoint = {
            "state_dict": weights,
            "optimizer": optimizer,
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "best": self.best.best,
            RUN_KEY: self.position.state_dict(),
            RECORD: self.record,
        }
        if self.fabric.global_rank == 0:
            save_checkpoint(checkpoint, self.folder / LAST)
