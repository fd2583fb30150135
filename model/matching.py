"""Hungarian matching of queries and targets (DETR), and the points at which masks are compared (PointRend).

Notation: A labelled frames, Q queries, F foreground classes, S targets of the frame that has most, P points, M matched
pairs.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor

from model.mask_classification import QueryMasks

OVERSAMPLING = 3
"""Candidates per point, of which the most uncertain are taken (PointRend's k)."""
UNCERTAIN_SHARE = 0.75
"""Share of the points taken by uncertainty (PointRend's beta); the others are uniform."""
INVALID_COST = 1e6
"""Cost in place of NaN or infinity, so that a diverged step still ends with a loss that tells so."""


class Targets(NamedTuple):
    """Targets of A frames, one per foreground class present, filled up to S.

    Attributes:
        classes: class of each target, 0 to F - 1, (A, S).
        valid: False where a frame has fewer than S targets, (A, S).
        masks: float32 0 or 1, 0 where not valid, (A, S, H, W).
    """

    classes: Tensor
    valid: Tensor
    masks: Tensor


class Matches(NamedTuple):
    """Indices of M matched pairs, (M,) each: the frame, its query, and its target."""

    frames: Tensor
    queries: Tensor
    targets: Tensor


def frame_targets(masks: Tensor, num_foreground: int) -> Targets:
    """One target per foreground class present in each frame.

    Args:
        masks: (A, H, W) class ids, 0 for background; with one foreground class, everything else is that class.
        num_foreground: F.
    """
    ids = masks.long().clamp(0, num_foreground)
    present = ids.new_zeros(len(ids), num_foreground + 1).scatter_(1, ids.flatten(1), 1)[:, 1:]  # (A, F)
    # With one class a target per frame is enough; else the largest number is read from the device.
    most = 1 if num_foreground == 1 or not len(ids) else max(1, int(present.sum(1).max()))
    valid, classes = present.sort(dim=1, descending=True, stable=True)
    valid, classes = valid[:, :most].bool(), classes[:, :most]
    of_class = (ids[:, None] == classes[..., None, None] + 1) & valid[..., None, None]
    return Targets(classes, valid, of_class.float())


def matching_cost(
    found: QueryMasks, targets: Targets, at: Tensor | None, weights: tuple[float, float, float]
) -> Tensor:
    """Cost of each pair of query and target, Mask2Former's: -P(class), binary cross entropy, and dice.

    Args:
        found: predictions, float32.
        targets: of the same frames.
        at: points in [0, 1] as (x, y), (A, P, 2), the same for all masks of a frame; None for all pixels of the mask
            logits.
        weights: of class, cross entropy and dice.

    Returns:
        (A, Q, S).
    """
    if at is None:
        logits, truth = found.mask_logits.flatten(2), coarse(targets.masks, found.mask_logits).flatten(2)
    else:
        logits, truth = sample(found.mask_logits, at), sample(targets.masks, at)  # (A, Q, P), (A, S, P)
    truth = truth.transpose(1, 2)  # (A, P, S)
    of_class = targets.classes[:, None].expand(-1, logits.shape[1], -1)
    class_cost = -found.class_logits.softmax(-1).gather(2, of_class)
    bce_cost = (F.softplus(logits).sum(-1, keepdim=True) - logits @ truth) / logits.shape[-1]
    probability = logits.sigmoid()
    total = probability.sum(-1, keepdim=True) + truth.sum(1, keepdim=True)
    dice_cost = 1 - (2 * (probability @ truth) + 1) / (total + 1)
    return weights[0] * class_cost + weights[1] * bce_cost + weights[2] * dice_cost


def match(costs: list[Tensor], valid: Tensor) -> list[Matches]:
    """The cheapest assignment of queries to targets per frame, each in at most one pair.

    A frame with more targets than queries leaves the most expensive targets without a query.

    Args:
        costs: (A, Q, S) of each decoder layer, moved to the CPU together.
        valid: (A, S).

    Returns:
        The pairs of each layer.
    """
    stacked = torch.stack(costs).nan_to_num(INVALID_COST, INVALID_COST, -INVALID_COST)
    stacked = stacked.masked_fill(~valid[:, None], torch.inf)
    return [_match_frames(layer, valid.device) for layer in stacked.cpu().numpy()]


def _match_frames(costs: np.ndarray, device: torch.device) -> Matches:
    frames, queries, targets = [], [], []
    for frame, cost in enumerate(costs):
        columns = np.isfinite(cost[0]).nonzero()[0]
        rows, chosen = linear_sum_assignment(cost[:, columns])
        frames.append(np.full(len(rows), frame))
        queries.append(rows)
        targets.append(columns[chosen])
    pairs = np.stack([np.concatenate([np.empty(0, int), *parts]) for parts in (frames, queries, targets)])
    return Matches(*torch.as_tensor(pairs, dtype=torch.long).to(device))


def coarse(masks: Tensor, like: Tensor) -> Tensor:
    """Masks (A, S, H, W) at the resolution of `like` (..., h, w): the share of each of its pixels that is covered."""
    return F.interpolate(masks, size=like.shape[-2:], mode="area")


def sample(maps: Tensor, at: Tensor) -> Tensor:
    """Bilinear values of maps (M, R, h, w) at points (M, P, 2) in [0, 1] as (x, y): (M, R, P)."""
    return F.grid_sample(maps, 2 * at[:, None] - 1, padding_mode="border", align_corners=False)[:, :, 0]


def uncertain_points(logits: Tensor, num_points: int) -> Tensor:
    """Points for the loss of each mask: most of them where it is uncertain (PointRend, Kirillov et al., 2020, 3.2).

    Args:
        logits: (M, h, w); uncertain near 0.
        num_points: P.

    Returns:
        (M, P, 2) in [0, 1] as (x, y), drawn from the device's generator.
    """
    uncertain = int(UNCERTAIN_SHARE * num_points)
    candidates = torch.rand(len(logits), OVERSAMPLING * num_points, 2, device=logits.device)
    magnitude = sample(logits[:, None], candidates)[:, 0].abs()
    chosen = magnitude.topk(uncertain, dim=1, largest=False).indices
    uniform = torch.rand(len(logits), num_points - uncertain, 2, device=logits.device)
    return torch.cat([candidates.gather(1, chosen[..., None].expand(-1, -1, 2)), uniform], dim=1)
