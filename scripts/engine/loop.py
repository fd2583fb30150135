"""The loop: one training epoch and one evaluation, the same for all tasks.

Notation: B clips per batch and process, T frames per clip, N = B * T.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from model.avs_model import ModelOutput, flagged_indices, scatter_rows
from scripts.engine.feature_cache import KnownFeatures
from scripts.engine.resume import Position
from scripts.engine.task_metrics import TaskMetrics
from utils.reproducibility import step_seed

Batch = dict[str, Any]
Losses = dict[str, Tensor]
KNOWN = "known_features"
"""In a batch of `to_device`: keyword arguments of the model in place of its frozen parts."""
Predict = Callable[[Batch, int], Tensor]
"""(batch, number of its first clip in the split) -> logits (N, K, H, W) float32."""


def train_one_epoch(
    model: _FabricModule,
    criterion: nn.Module,
    loader: DataLoader[Batch],
    optimizer: Optimizer,
    *,
    fabric: Fabric,
    position: Position,
    process: Mapping[str, Any],
    schedule: LRScheduler | None = None,
    known: KnownFeatures | None = None,
    on_loss: Callable[[Losses, Batch], None],
    on_batch: Callable[[Losses, Batch, bool, Tensor | None], None],
) -> None:
    """Train from where the epoch stands to its end.

    Args:
        model: from `fabric.setup_module`.
        criterion: `criterion(output, masks, flag)` -> named losses, `total` among them.
        loader: of the train split, at batch `position.batch` of epoch `position.epoch`.
        optimizer: from `fabric.setup_optimizers`.
        fabric: precision, processes and devices.
        position: where the run stands; kept up to date.
        process: `cfg.process`.
        schedule: stepped after each optimizer step, if any.
        known: outputs of frozen parts, computed once.
        on_loss: called before the backward pass; raises to stop the run.
        on_batch: called after each batch with its losses, the batch, whether the optimizer has stepped, and the
            gradient's norm before it was clipped, None where nothing is clipped.
    """
    model.train()
    accumulate, batches = process["accumulate"], len(loader)
    for index, batch in enumerate(loader, start=position.batch):
        torch.manual_seed(step_seed(process["seed"], position.epoch, index, fabric.global_rank))
        batch = to_device(batch, fabric.device, known)
        steps = (index + 1) % accumulate == 0 or index + 1 == batches
        with fabric.no_backward_sync(model, enabled=not steps):
            labelled = batch["labelled_indices"]
            output = forward(model, batch, labelled)
            losses = criterion(output, *targets(batch, labelled))
            on_loss(losses, batch)
            # The last step of an epoch may have fewer batches.
            fabric.backward(losses["total"] / min(accumulate, batches - index // accumulate * accumulate))
        gradient_norm = None
        if steps:
            if process["clip_grad_norm"] is not None:
                gradient_norm = fabric.clip_gradients(
                    model, optimizer, max_norm=process["clip_grad_norm"], error_if_nonfinite=False
                )
            optimizer.step()
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
            position.step += 1
        position.batch = index + 1
        on_batch({name: value.detach() for name, value in losses.items()}, batch, steps, gradient_norm)


def evaluate(
    predict: Predict,
    loader: DataLoader[Batch],
    metrics: TaskMetrics,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[int, Batch, Tensor, int], None] | None = None,
) -> dict[str, float]:
    """Score a split.

    Args:
        predict: what is scored: a model (`predictor`) or an oracle.
        loader: of the split, in order; several processes take its batches in turn.
        metrics: of the task; reset first.
        rank: of this process.
        world_size: processes.
        on_batch: called with (index of the batch, batch, logits, number of its first clip).

    Returns:
        The scalar metrics of the whole split, the same on all processes.
    """
    metrics.reset()
    batch_size = loader.batch_sampler.batch_size  # type: ignore[union-attr]
    for index, batch in enumerate(loader):
        first_clip = (index * world_size + rank) * batch_size
        logits = predict(batch, first_clip)
        metrics.update(logits, batch, first_clip)
        if on_batch is not None:
            on_batch(index, batch, logits, first_clip)
    return metrics.scalars()


def predictor(model: nn.Module, device: torch.device, known: KnownFeatures | None = None) -> Predict:
    """`predict` of a model, for `evaluate`; puts the model into evaluation mode.

    Args:
        model: called as it is: precision is the caller's.
        device: of the model.
        known: outputs of frozen parts, computed once.
    """
    model.eval()

    @torch.inference_mode()
    def predict(batch: Batch, first_clip: int) -> Tensor:
        batch = to_device(batch, device, known)
        real = batch["real_indices"]  # padded frames need no masks
        logits = forward(model, batch, real).logits.float()
        return scatter_rows(logits, real, batch["vid_temporal_mask_flag"].numel())

    return predict


def to_device(batch: Batch, device: torch.device, known: KnownFeatures | None = None) -> Batch:
    """A batch on a device, with the indices of its labelled and of its real frames (None: all), and known features.

    Both are found first, on the CPU, where that needs no synchronisation. `label_mask` is the labels' flag (N,)
    if no frame has a label, else None: labelled frames are selected by index.
    """
    indices = {
        name: flagged_indices(batch[flag].flatten())
        for name, flag in (("labelled_indices", "gt_temporal_mask_flag"), ("real_indices", "vid_temporal_mask_flag"))
    }
    labelled = batch["gt_temporal_mask_flag"].flatten()
    found = {**batch, **indices, "label_mask": None if labelled.any() else labelled}
    found[KNOWN] = {} if known is None else known(batch)
    moved: Batch = tree_map(
        lambda value: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value, found
    )
    return moved


def forward(model: nn.Module, batch: Batch, frame_indices: Tensor | None) -> ModelOutput:
    """The model's output for a batch of `to_device`, for the frames (A,) whose masks are needed; None: all."""
    real = batch["real_indices"]
    output: ModelOutput = model(
        batch["log_mel"].flatten(0, 1),
        batch["frames"].flatten(0, 1),
        None if real is None else batch["vid_temporal_mask_flag"].flatten(),
        frame_indices,
        real_indices=real,
        **batch[KNOWN],
    )
    return output


def targets(batch: Batch, frame_indices: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Masks (A, H, W) of the labelled frames of a batch, and the criterion's `label_mask`."""
    masks = batch["masks"].flatten(0, 1)
    return masks if frame_indices is None else masks[frame_indices], batch["label_mask"]


def evaluates(process: Mapping[str, Any], epoch: int) -> bool:
    """Whether an epoch ends with a validation: every `eval_interval` from `start_eval_epoch` on, and the last."""
    since = epoch - process["start_eval_epoch"]
    return (since >= 0 and since % process["eval_interval"] == 0) or epoch == process["train_epochs"] - 1
