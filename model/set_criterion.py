"""The criterion of mask classification: queries matched with the objects of a frame, losses of the pairs."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.criterion import check_labels, dice_loss, labelled_rows, mean_over_processes, mix_map, non_negative
from model.head import ModelOutput
from model.mask_classification import QueryMasks, num_foreground
from model.matching import Matches, Targets, coarse, frame_targets, match, matching_cost, sample, uncertain_points
from utils.errors import ConfigError
from utils.registry import MODELS


class _Norms(NamedTuple):
    """Normalisers of a batch: targets, sum of the class weights of all queries, labelled frames."""

    targets: Tensor
    class_weights: Tensor
    frames: Tensor


@MODELS.register_module()
class MaskClassificationLoss(nn.Module):
    """Set loss of Mask2Former (Cheng et al., 2022) for `MaskClassifier`, plus mix loss and balance loss.

    The targets of a labelled frame are the masks of the foreground classes present in it: at most one in s4 and ms3.
    Each is matched with one query, by the cheapest assignment of -P(class), binary cross entropy (BCE) and dice with
    the weights of the losses. The class loss is the cross entropy of all queries, where those without a target learn
    'no object' with weight `no_object_weight`, divided by the sum of these weights. BCE and dice of matched pairs are
    summed and divided by the number of targets of the batch (at least 1). A frame in which nothing sounds has a
    gradient in the class logits alone: all of its queries learn 'no object'.

    With `model.head.deep_supervision=True` every decoder layer is matched and has its losses, which are summed: the
    last layer with weight 1, each earlier one with `layer_weight`.

    In training under `torch.distributed`, the normalisers are averaged over the processes, so that averaged gradients
    equal those of one process with all clips.

    Args:
        num_classes: K; 1 for binary segmentation, else with background as class 0.
        class_weight: weight of the class loss, and of -P(class) in the matching.
        mask_weight: of BCE.
        dice_weight: of dice.
        no_object_weight: of queries without a target in the class loss.
        mix_weight: weight of the mix loss, dice of the channel mean of the fused mask feature (see SegmentationLoss).
        layer_weight: weight of each earlier decoder layer.
        num_points: points per mask where masks are compared: uniform in the matching, mostly uncertain ones in the
            losses, targets at full resolution. None compares all pixels of the mask logits (H / 4 x W / 4) with the
            share of each that is covered. Mask2Former's 12544 is more than all pixels of frames below 448 x 448, where
            None is cheaper.

    Raises:
        ValueError: a weight that is negative or not finite, no classes, or fewer than 4 points.
    """

    names = ("total", "class_loss", "mask_loss", "mix_loss", "balance_loss")

    def __init__(
        self,
        num_classes: int,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        mix_weight: float = 0.1,
        layer_weight: float = 1.0,
        num_points: int | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        if num_points is not None and (isinstance(num_points, bool) or not isinstance(num_points, int)):
            raise ValueError(f"num_points={num_points!r} is not a number of points; give a whole number, or None")
        if num_points is not None and num_points < 4:
            raise ValueError(f"num_points={num_points} is too few; give 4 or more, or None for all pixels")
        self.num_classes = num_classes
        self.num_foreground = num_foreground(num_classes)
        self.class_weight = non_negative("class_weight", class_weight)
        self.mask_weight = non_negative("mask_weight", mask_weight)
        self.dice_weight = non_negative("dice_weight", dice_weight)
        self.no_object_weight = non_negative("no_object_weight", no_object_weight)
        self.mix_weight = non_negative("mix_weight", mix_weight)
        self.layer_weight = non_negative("layer_weight", layer_weight)
        self.num_points = num_points

    def forward(self, out: ModelOutput, masks: Tensor, label_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Weighted losses of one batch.

        Args:
            out: the model's output for N frames, with `query_masks`.
            masks: (N, H, W) class ids, 0 for background. Masks of unlabelled frames are ignored.
            label_mask: (N,), 1 for labelled frames; None if all are labelled.

        Returns:
            Scalars `class_loss`, `mask_loss` (BCE and dice), `mix_loss`, `balance_loss`, multiplied by their weights,
            and `total`, their sum.

        Raises:
            ConfigError: the mask head does not classify queries.
            ValueError: shapes do not fit together.
        """
        self._check(out, masks, label_mask)
        with torch.autocast(out.logits.device.type, enabled=False):
            return self._losses(out, masks, label_mask)

    def _losses(self, out: ModelOutput, masks: Tensor, label_mask: Tensor | None) -> dict[str, Tensor]:
        layers, mask_feature = [(found.class_logits, found.mask_logits) for found in out.query_masks], out.mask_feature
        rows = labelled_rows(label_mask)
        if rows is not None:
            rows = rows.to(out.logits.device)
            layers = [(classes[rows], pixels[rows]) for classes, pixels in layers]
            mask_feature, masks = mask_feature[rows], masks[rows]
        found = [QueryMasks(classes.float(), pixels.float()) for classes, pixels in layers]

        targets = frame_targets(masks, self.num_foreground)
        matches = self._match(found, targets)
        norms = self._norms(found[-1], targets, matches[-1])
        mix_loss = dice_loss(mix_map(mask_feature, masks), masks > 0)  # (A,)
        losses = {
            "class_loss": torch.zeros_like(norms.frames),
            "mask_loss": torch.zeros_like(norms.frames),
            "mix_loss": self.mix_weight * mix_loss.sum() / norms.frames,
            "balance_loss": out.aux_loss.float(),
        }
        weights = [self.layer_weight] * (len(found) - 1) + [1.0]
        for weight, layer, pairs in zip(weights, found, matches, strict=True):
            losses["class_loss"] = losses["class_loss"] + weight * self._class_loss(layer, targets, pairs, norms)
            losses["mask_loss"] = losses["mask_loss"] + weight * self._mask_loss(layer, targets, pairs, norms)
        return {"total": torch.stack(list(losses.values())).sum(), **losses}

    @torch.no_grad()
    def _match(self, found: list[QueryMasks], targets: Targets) -> list[Matches]:
        at = None
        if self.num_points is not None:
            at = torch.rand(len(targets.masks), self.num_points, 2, device=targets.masks.device)
        weights = (self.class_weight, self.mask_weight, self.dice_weight)
        return match([matching_cost(layer, targets, at, weights) for layer in found], targets.valid)

    def _norms(self, found: QueryMasks, targets: Targets, pairs: Matches) -> _Norms:
        frames, queries = found.class_logits.shape[:2]
        matched = len(pairs.frames)
        class_weights = matched + self.no_object_weight * (frames * queries - matched)
        sums = torch.stack(
            [targets.valid.sum().float(), *torch.tensor([class_weights, frames]).to(targets.valid.device)]
        )
        num_targets, class_weights_mean, num_frames = mean_over_processes(sums, self.training).unbind()
        one = torch.ones_like(num_targets)
        return _Norms(
            num_targets.clamp(min=1),
            torch.where(class_weights_mean > 0, class_weights_mean, one),
            torch.where(num_frames > 0, num_frames, one),
        )

    def _class_loss(self, found: QueryMasks, targets: Targets, pairs: Matches, norms: _Norms) -> Tensor:
        frames, queries = found.class_logits.shape[:2]
        truth = torch.full((frames, queries), self.num_foreground, device=found.class_logits.device)
        truth[pairs.frames, pairs.queries] = targets.classes[pairs.frames, pairs.targets]
        weight = found.class_logits.new_ones(self.num_foreground + 1)
        weight[-1] = self.no_object_weight
        loss = F.cross_entropy(found.class_logits.flatten(0, 1), truth.flatten(), weight, reduction="sum")
        return self.class_weight * loss / norms.class_weights

    def _mask_loss(self, found: QueryMasks, targets: Targets, pairs: Matches, norms: _Norms) -> Tensor:
        logits = found.mask_logits[pairs.frames, pairs.queries]  # (M, h, w)
        if self.num_points is None:
            masks = coarse(targets.masks, logits)[pairs.frames, pairs.targets]
            logits, truth = logits.flatten(1), masks.flatten(1)
        else:
            at = uncertain_points(logits.detach(), self.num_points)
            truth = sample(targets.masks[pairs.frames, pairs.targets][:, None], at)[:, 0]
            logits = sample(logits[:, None], at)[:, 0]
        bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)  # (M,)
        probability = logits.sigmoid()
        total = probability.sum(1) + truth.sum(1)
        dice = 1 - (2 * (probability * truth).sum(1) + 1) / (total + 1)
        return (self.mask_weight * bce.sum() + self.dice_weight * dice.sum()) / norms.targets

    def _check(self, out: ModelOutput, masks: Tensor, label_mask: Tensor | None) -> None:
        if not out.query_masks:
            raise ConfigError(
                "loss.type='MaskClassificationLoss' needs queries with classes: set "
                "model.head.mask_head=dict(_delete_=True, type='MaskClassifier'), or loss.type='SegmentationLoss'."
            )
        frames, _, classes = out.query_masks[-1].class_logits.shape
        if classes != self.num_foreground + 1:
            raise ValueError(
                f"queries have {classes - 1} classes and 'no object', the criterion was built for {self.num_foreground}"
            )
        check_labels(frames, tuple(out.logits.shape[-2:]), masks, label_mask)
