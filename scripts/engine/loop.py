"""One step of training and of validation, the same for all tasks.

Notation: B clips a batch and process, T frames a clip, N = B * T.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor, nn

from model import AVSModel
from model.avs_model import among_zeros, places
from scripts.engine.evaluation import Scores
from scripts.engine.feature_cache import FrozenFeatures
from utils.errors import ConfigError, UserError
from utils.reproducibility import step_seed
from utils.schedules import build_schedule

LOSSES = ("total", "iou_loss", "mix_loss", "balance_loss")
NONFINITE_FILE = "nonfinite.json"


class NonFiniteLossError(UserError):
    """The loss became infinite or not a number; the run stopped before taking the step."""


class AVSTraining(LightningModule):
    """One training and validation step, for all tasks.

    Args:
        model: from `model.build_model`.
        criterion: from `model.criterion.build_criterion`.
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
        buffers = self._local_statistics() if self.trainer.world_size > 1 else []
        if not buffers:
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


def evaluates(process: Mapping[str, Any], epoch: int) -> bool:
    """Whether an epoch ends with a validation: every `eval_interval` from `start_eval_epoch` on, and the last."""
    since = epoch - process["start_eval_epoch"]
    return (since >= 0 and since % process["eval_interval"] == 0) or epoch == process["train_epochs"] - 1
