"""What training minimises: one criterion for s4, ms3 and avss, which differ in classes and labelled frames alone."""

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import ConfigError
from utils.registry import suggestion

LOSS_TYPES = ("dice", "bce")
WEIGHTS = {"iou_loss": 1.0, "mix_loss": 0.1}


class SegmentationOutput(Protocol):
    """The part of the model's output that the criterion reads."""

    logits: Tensor  # (N, K, H, W)
    mask_feature: Tensor  # (N, C, h, w)
    aux_loss: Tensor  # ()


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice loss with squared sums in the denominator (V-Net, Milletari et al. 2016), one value a frame.

    Args:
        logits: (N, H, W), float.
        target: (N, H, W), 0 or 1, any dtype.

    Returns:
        (N,) float32 in [0, 1]. A frame without object costs 1 unless it is predicted empty to the last digit, since
        nothing can overlap.
    """
    probability = logits.float().sigmoid().flatten(1)  # (N, H*W)
    target = target.to(probability.dtype).flatten(1)
    overlap = (probability * target).sum(1)
    # 0.001 a sum, as published: it also keeps an empty frame's quotient finite.
    return 1 - 2 * overlap / (probability.square().sum(1) + 0.001 + target.square().sum(1) + 0.001)


def bce_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy, mean over the pixels of each frame: (N, H, W) and (N, H, W) -> (N,) float32."""
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none").mean((1, 2))


def cross_entropy_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy, mean over the pixels of each frame: (N, K, H, W) and class ids (N, H, W) -> (N,) float32."""
    return F.cross_entropy(logits.float(), target.long(), reduction="none").mean((1, 2))


class SegmentationLoss(nn.Module):
    """Mask loss + mix loss + balance loss, over the frames that have a label.

    With one class, the mask loss is dice or binary cross entropy of the logits, and the mix loss is the same of the
    fused mask feature's channel mean. With more classes they are cross entropy, and dice of that mean against 'any
    class but background'. Each is a mean over frames weighted by their label flag: the first frame of a clip in s4, all
    in ms3, and in avss as many as the clip has.

    In training under `torch.distributed` the flags' sum is the mean over the processes, so that averaged gradients are
    those of one process holding all clips, also where clips differ in labelled frames. In evaluation (`eval()`) nothing
    is exchanged, because processes may have different numbers of batches.

    Args:
        num_classes: K; 1 means object or not.
        loss_type: 'dice' or 'bce', for K = 1.
        iou_weight: weight of the mask loss.
        mix_weight: weight of the mix loss. The balance loss carries its own weight.
    """

    def __init__(
        self, *, num_classes: int, loss_type: str = "dice", iou_weight: float = 1.0, mix_weight: float = 0.1
    ) -> None:
        super().__init__()
        if loss_type not in LOSS_TYPES:
            raise ConfigError(f"loss.loss_type: '{loss_type}' is not a loss; {suggestion(loss_type, list(LOSS_TYPES))}")
        if num_classes < 1:
            raise ConfigError(f"num_classes: {num_classes} classes cannot be scored; give 1 or more.")
        self.num_classes = num_classes
        self.binary_loss = dice_loss if num_classes > 1 or loss_type == "dice" else bce_loss
        self.iou_weight = iou_weight
        self.mix_weight = mix_weight

    def forward(
        self, out: SegmentationOutput, masks: Tensor, gt_temporal_mask_flag: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses of one batch.

        Args:
            out: the model's output for N frames.
            masks: (N, H, W) class ids, 0 = background. Masks of frames without label are not looked at.
            gt_temporal_mask_flag: (N,), 1 = the frame has a label. Default: all have.

        Returns:
            Scalars `iou_loss`, `mix_loss`, `balance_loss`, weights applied, and `total`, their sum. Without any
            labelled frame the first two are 0.

        Raises:
            ValueError: shapes that do not belong together.
        """
        self._check(out, masks, gt_temporal_mask_flag)
        flag = masks.new_ones(len(masks)) if gt_temporal_mask_flag is None else gt_temporal_mask_flag.detach()
        flag = flag.to(out.logits.device, torch.float32)
        frames_labelled = self._normaliser(flag)

        logits, mask_feature = out.logits, out.mask_feature
        if gt_temporal_mask_flag is not None:
            # Left out, not weighed with 0: whatever is predicted for them cannot reach the sums.
            labelled = flag.nonzero().squeeze(1)
            if len(labelled) < len(flag):
                logits, mask_feature, masks, flag = (x[labelled] for x in (logits, mask_feature, masks, flag))

        sounding = masks > 0
        if self.num_classes == 1:
            iou = self.binary_loss(logits.squeeze(1), sounding)  # (N,)
        else:
            iou = cross_entropy_loss(logits, masks)
        # Channels last, as the feature lies: the gradient of a mean lies as its axes are named, whatever its input did.
        mean = mask_feature.movedim(1, -1).float().mean(-1)[:, None]
        mix_logits = F.interpolate(mean, size=masks.shape[-2:], mode="bilinear", align_corners=False)
        mix = self.binary_loss(mix_logits.squeeze(1), sounding)

        losses = {
            "iou_loss": self.iou_weight * (iou * flag).sum() / frames_labelled,
            "mix_loss": self.mix_weight * (mix * flag).sum() / frames_labelled,
            "balance_loss": out.aux_loss.float(),
        }
        return {"total": torch.stack(list(losses.values())).sum(), **losses}

    def _normaliser(self, flag: Tensor) -> Tensor:
        """Labelled frames a process, averaged over the processes that step together; never 0."""
        labelled = flag.sum()
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(labelled)
            labelled = labelled / torch.distributed.get_world_size()
        return torch.where(labelled > 0, labelled, torch.ones_like(labelled))

    def _check(self, out: SegmentationOutput, masks: Tensor, flag: Tensor | None) -> None:
        frames, classes, *size = out.logits.shape
        if classes != self.num_classes:
            raise ValueError(f"logits have {classes} classes, the criterion was built for {self.num_classes}")
        if tuple(masks.shape) != (frames, *size):
            raise ValueError(f"masks of shape {tuple(masks.shape)} do not fit logits {tuple(out.logits.shape)}")
        if flag is not None and tuple(flag.shape) != (frames,):
            raise ValueError(f"gt_temporal_mask_flag of shape {tuple(flag.shape)} does not fit {frames} frames")


def build_criterion(cfg: Mapping[str, Any], num_classes: int) -> SegmentationLoss:
    """The criterion that a config's `loss` names.

    Args:
        cfg: `weight_dict` with `iou_loss` and `mix_loss` (1.0 and 0.1 where left out), and `loss_type`.
        num_classes: K.

    Raises:
        ConfigError: a key, weight or loss type that is not known.
    """
    for key in cfg:
        if key not in ("weight_dict", "loss_type"):
            raise ConfigError(f"loss.{key}: unknown key; {suggestion(key, ['weight_dict', 'loss_type'])}")
    weights = dict(WEIGHTS)
    for key, weight in cast(Mapping[str, Any], cfg.get("weight_dict") or {}).items():
        if key not in WEIGHTS:
            raise ConfigError(f"loss.weight_dict.{key}: unknown loss; {suggestion(key, list(WEIGHTS))}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise ConfigError(f"loss.weight_dict.{key}: {weight!r} is no weight; give a finite number from 0 up.")
        weights[key] = float(weight)
    return SegmentationLoss(
        num_classes=num_classes,
        loss_type=cfg.get("loss_type", "dice"),
        iou_weight=weights["iou_loss"],
        mix_weight=weights["mix_loss"],
    )
