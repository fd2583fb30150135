"""The scores as their definitions read: one pass a threshold, a class and a frame.

Slow on purpose: the tests compare utils/metrics.py with these, and scripts/benchmark/model.py times them.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dataloader.palette import palette
from utils.metrics import BETA2, f_beta, pr_thresholds


def literal_mask_iou(logits: Tensor, target: Tensor) -> Tensor:
    """Mean IoU of logits (N, 1, H, W) and masks (N, H, W), frame by frame; an empty frame scores its empty share."""
    scores = []
    for frame_logits, frame_target in zip(logits[:, 0].float(), target > 0, strict=True):
        predicted = frame_logits.sigmoid() > 0.5
        if frame_target.any():
            scores.append((predicted & frame_target).sum().double() / (predicted | frame_target).sum())
        else:
            scores.append((~predicted).double().mean())
    return torch.stack(scores).mean()


def literal_f_score(logits: Tensor, target: Tensor) -> Tensor:
    """Maximal F of the mean curve of logits (N, 1, H, W) against masks (N, H, W), one pass a threshold and frame."""
    thresholds = pr_thresholds(logits.device)
    curves = []
    for probability, frame_target in zip(logits[:, 0].float().sigmoid(), (target > 0).float(), strict=True):
        if not frame_target.any():
            continue
        curve = torch.zeros(len(thresholds), dtype=torch.float64)
        for i, threshold in enumerate(thresholds):
            predicted = (probability >= threshold).float()
            true_positive = (predicted * frame_target).sum().double()
            precision = (true_positive / predicted.sum().double()).nan_to_num(0.0)
            recall = true_positive / frame_target.sum().double()
            curve[i] = f_beta(precision, recall)
        curves.append(curve)
    return torch.stack(curves).mean(0).max() if curves else torch.zeros(())


def literal_semantic_sums(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU sums, F sums and frame counts (K,) of logits (N, K, H, W) and class ids (N, H, W), class by class."""
    k = logits.shape[1]
    iou_sum, f_sum, frames = torch.zeros(3, k, dtype=torch.float64)
    for frame_logits, frame_target in zip(logits, target, strict=True):
        prediction = frame_logits.argmax(0)
        for c in range(k):
            predicted, labelled = prediction == c, frame_target == c
            intersection = float((predicted & labelled).sum())
            union = float((predicted | labelled).sum())
            if union == 0:
                continue
            frames[c] += 1
            iou_sum[c] += intersection / union
            if intersection > 0:
                precision, recall = intersection / float(predicted.sum()), intersection / float(labelled.sum())
                f_sum[c] += (1 + BETA2) * precision * recall / (BETA2 * precision + recall)
    return iou_sum, f_sum, frames


def literal_decode(colours: npt.NDArray[np.uint8], num_classes: int = 71) -> npt.NDArray[np.uint8]:
    """Class indices of an AVSS label image (H, W, 3) uint8, one comparison per class; 255 for any other colour."""
    classes = np.full(colours.shape[:2], 255, np.uint8)
    for index, colour in enumerate(palette(num_classes)):
        classes[(colours == colour).all(axis=-1)] = index
    return classes
