"""The training criterion: one for s4, ms3 and avss, which differ in classes and labelled frames only."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.head import ModelOutput
from utils.errors import ConfigError
from utils.registry import MODELS, build, suggestion


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 0.001) -> Tensor:
    """Dice loss with squared sums in the denominator (V-Net, Milletari et al., 2016), one value per frame.

    Args:
        logits: (N, H, W), float.
        target: (N, H, W), 0 or 1, any dtype.
        smooth: added to each of the two sums; 0.001 as published, which also keeps the quotient of an empty frame
            finite.

    Returns:
        (N,) float32 in [0, 1]. A frame without object costs almost 1, and has almost no gradient.
    """
    probability = logits.float().sigmoid().flatten(1)  # (N, H * W)
    target = target.to(probability.dtype).flatten(1)
    overlap = (probability * target).sum(1)
    return 1 - 2 * overlap / (probability.square().sum(1) + smooth + target.square().sum(1) + smooth)


def bce_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy, mean over the pixels of each frame: (N, H, W) and (N, H, W) -> (N,) float32."""
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none").mean((1, 2))


def bce_dice_loss(logits: Tensor, target: Tensor, smooth: float = 0.5, bce_weight: float = 2.0) -> Tensor:
    """Sum of dice and binary cross entropy, which has a gradient in frames without object: -> (N,) float32."""
    return bce_weight * bce_loss(logits, target) + dice_loss(logits, target, smooth)


def cross_entropy_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy, mean over the pixels of each frame: (N, K, H, W) and class ids (N, H, W) -> (N,) float32."""
    return F.cross_entropy(logits.float(), target.long(), reduction="none").mean((1, 2))


BINARY_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dice": dice_loss,
    "bce": bce_loss,
    "bce_dice": bce_dice_loss,
}


@MODELS.register_module()
class SegmentationLoss(nn.Module):
    """Mask loss + mix loss + balance loss over the labelled frames.

    With one class, the mask loss is dice or binary cross entropy of the logits; the mix loss is the same of the channel
    mean of the fused mask feature. With several classes, the mask loss is cross entropy, and the mix loss is dice of
    that mean against 'any class but background'. Both are means over frames weighted by their label flag: the first
    frame of a clip in s4, all in ms3, the clip's labelled frames in avss.

    In training under `torch.distributed`, the sum of the flags is averaged over the processes, so that averaged
    gradients equal those of one process with all clips, also with different numbers of labelled frames. In evaluation
    nothing is reduced, because processes may have different numbers of batches.

    Args:
        num_classes: K; 1 for binary segmentation.
        mask_loss: for K = 1, 'dice' (published), 'bce', or 'bce_dice', the sum of both; for K > 1 it is cross entropy.
        mask_weight: weight of the mask loss.
        mix_weight: weight of the mix loss. The balance loss has its weight in the fusion block (`loss_coef`).
        layer_weight: with `model.head.deep_supervision`, each decoder layer but the last adds this times its mask loss
            (a sum over layers, as in DETR).

    Raises:
        ValueError: an unknown loss, a weight that is negative or not finite, or no classes.
    """

    names = ("total", "mask_loss", "mix_loss", "balance_loss")

    def __init__(
        self,
        num_classes: int,
        mask_loss: str = "dice",
        mask_weight: float = 1.0,
        mix_weight: float = 0.1,
        layer_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if mask_loss not in BINARY_LOSSES:
            raise ValueError(
                f"mask_loss={mask_loss!r} is not a loss; {suggestion(str(mask_loss), list(BINARY_LOSSES))}"
            )
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        self.num_classes = num_classes
        self.binary_loss = dice_loss if num_classes > 1 else BINARY_LOSSES[mask_loss]
        self.mask_weight = non_negative("mask_weight", mask_weight)
        self.mix_weight = non_negative("mix_weight", mix_weight)
        self.layer_weight = non_negative("layer_weight", layer_weight)

    def forward(self, out: ModelOutput, masks: Tensor, label_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Weighted losses of one batch.

        Args:
            out: the model's output for N frames.
            masks: (N, H, W) class ids, 0 for background. Masks of unlabelled frames are ignored.
            label_mask: (N,), 1 for labelled frames; None if all are labelled.

        Returns:
            Scalars `mask_loss`, `mix_loss`, `balance_loss`, multiplied by their weights, and `total`, their sum.
            Without labelled frames the first two are 0.

        Raises:
            ConfigError: the mask head classifies queries.
            ValueError: shapes do not fit together.
        """
        self._check(out, masks, label_mask)
        flag = masks.new_ones(len(masks)) if label_mask is None else label_mask.detach()
        flag = flag.to(out.logits.device, torch.float32)
        num_labelled = mean_over_processes(flag.sum(), self.training)
        num_labelled = torch.where(num_labelled > 0, num_labelled, torch.ones_like(num_labelled))

        layers, mask_feature = [*out.layer_logits, out.logits], out.mask_feature
        rows = labelled_rows(label_mask)
        if rows is not None:
            rows = rows.to(flag.device)
            mask_feature, masks, flag, *layers = (x[rows] for x in (mask_feature, masks, flag, *layers))

        *earlier, mask_loss = (self._mask_loss(logits, masks) for logits in layers)  # (N,)
        for of_layer in earlier:
            mask_loss = mask_loss + self.layer_weight * of_layer
        mix_loss = self.binary_loss(mix_map(mask_feature, masks), masks > 0)  # (N,)

        losses = {
            "mask_loss": self.mask_weight * (mask_loss * flag).sum() / num_labelled,
            "mix_loss": self.mix_weight * (mix_loss * flag).sum() / num_labelled,
            "balance_loss": out.aux_loss.float(),
        }
        return {"total": torch.stack(list(losses.values())).sum(), **losses}

    def _mask_loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        if self.num_classes == 1:
            return self.binary_loss(logits.squeeze(1), masks > 0)
        return cross_entropy_loss(logits, masks)

    def _check(self, out: ModelOutput, masks: Tensor, label_mask: Tensor | None) -> None:
        if out.query_masks:
            raise ConfigError(
                "model.head.mask_head.type='MaskClassifier' is trained by matching: set "
                "loss=dict(_delete_=True, type='MaskClassificationLoss')."
            )
        frames, classes, *size = out.logits.shape
        if classes != self.num_classes:
            raise ValueError(f"logits have {classes} classes, the criterion was built for {self.num_classes}")
        check_labels(frames, tuple(size), masks, label_mask)


def mix_map(mask_feature: Tensor, masks: Tensor) -> Tensor:
    """Logits of the mix loss: channel mean of the mask feature (N, C, h, w), upsampled to the masks' (N, H, W)."""
    # Reduce over the last axis, so that the gradient stays channels_last.
    mean = mask_feature.movedim(1, -1).float().mean(-1)[:, None]  # (N, 1, h, w)
    return F.interpolate(mean, size=masks.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)


def labelled_rows(label_mask: Tensor | None) -> Tensor | None:
    """Indices of labelled frames; None if all frames are labelled.

    The others are removed instead of weighted by 0: NaN predictions of unlabelled frames must not reach the sums.
    """
    if label_mask is None:
        return None
    rows = label_mask.detach().nonzero().squeeze(1)
    return rows if len(rows) < len(label_mask) else None


def mean_over_processes(count: Tensor, training: bool) -> Tensor:
    """A normaliser of the batch, averaged over the processes of a training step; changed in place."""
    if training and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count


def check_labels(frames: int, size: tuple[int, ...], masks: Tensor, label_mask: Tensor | None) -> None:
    """Check masks (N, H, W) and label_mask (N,) against the model's output.

    Raises:
        ValueError: their shapes do not fit.
    """
    if tuple(masks.shape) != (frames, *size):
        raise ValueError(f"masks of shape {tuple(masks.shape)} do not fit {frames} frames of {size} pixels")
    if label_mask is not None and tuple(label_mask.shape) != (frames,):
        raise ValueError(f"label_mask of shape {tuple(label_mask.shape)} does not fit {frames} frames")


def build_criterion(cfg: Mapping[str, Any], num_classes: int) -> nn.Module:
    """Build the criterion of a config.

    Args:
        cfg: `config.loss`: `type` ('SegmentationLoss' if left out) and the class's arguments.
        num_classes: K.

    Returns:
        A module with SegmentationLoss's `forward`.

    Raises:
        ConfigError: an unknown type or key, or a value out of range.
    """
    criterion: nn.Module = build(MODELS, {"type": "SegmentationLoss", **cfg}, where="loss", num_classes=num_classes)
    return criterion


def criterion_names(criterion: nn.Module) -> tuple[str, ...]:
    """Names of the losses that a criterion returns: its attribute `names`, or `total` alone."""
    return tuple(getattr(criterion, "names", ("total",)))


def non_negative(name: str, value: float) -> float:
    """The weight as a float; raises ValueError if it is negative, not finite or not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value!r} is not a weight; give a finite number from 0 up")
    return float(value)
