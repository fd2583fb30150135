"""AVSBench's scores as torchmetrics; several processes give the scores of one.

Every metric takes logits and labels of N frames, and optionally `frame_flag` (N,): frames flagged 0 are ignored, for
example the padded frames of short avss clips and clips repeated by a distributed sampler.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

BETA2 = 0.3
NUM_THRESHOLDS = 255
CELLS = 2**16


def pr_thresholds(device: torch.device | None = None) -> Tensor:
    """AVSBench's 255 thresholds, evenly from 0 to 1 (1 - 1e-10 is 1 in float32): (255,) float32."""
    return torch.linspace(0, 1 - 1e-10, NUM_THRESHOLDS, device=device)


def f_beta(precision: Tensor, recall: Tensor, beta2: float = BETA2) -> Tensor:
    """Weighted harmonic mean of precision and recall; 0 where both are 0 or one is undefined."""
    return ((1 + beta2) * precision * recall / (beta2 * precision + recall)).nan_to_num(0.0)


def frame_f_curves(probability: Tensor, target: Tensor) -> Tensor:
    """F of every frame at each of the 255 thresholds, from one histogram per frame.

    A pixel is predicted as object at every threshold up to its probability, so the predicted pixels and the true
    positives at all thresholds are cumulative sums of two histograms over the intervals between thresholds.

    Args:
        probability: (N, H, W) float32 in [0, 1].
        target: (N, H, W) bool.

    Returns:
        (N, 255) float64; 0 for a frame without object.
    """
    n = len(probability)
    thresholds = pr_thresholds(probability.device)
    bins = NUM_THRESHOLDS + 1
    bucket = _thresholds_reached(probability.flatten(), thresholds).view(n, -1)  # (N, H*W), 0..255
    rows = torch.arange(n, device=bucket.device, dtype=bucket.dtype)[:, None]
    index = (rows * 2 + target.flatten(1)) * bins + bucket
    histogram = _counts(index, n * 2 * bins).view(n, 2, bins)  # background, object
    reached = histogram.flip(-1).cumsum(-1).flip(-1)[..., 1:].double()  # pixels whose probability >= threshold
    true_positive, predicted = reached[:, 1], reached.sum(1)
    objects = histogram[:, 1].sum(-1, keepdim=True).double()
    return f_beta((true_positive / predicted).nan_to_num(0.0), (true_positive / objects).nan_to_num(0.0))


def _thresholds_reached(probability: Tensor, thresholds: Tensor) -> Tensor:
    """Number of thresholds up to each of (P,) probabilities, int32, 0 for NaN: bucketize, on a CPU by a table.

    [0, 1] is divided into 65,536 cells; a probability's cell is exact in float32, and only probabilities in the few
    cells that contain a threshold are compared with it.
    """
    if probability.device.type != "cpu":  # which probabilities to compare would have to be read from the device
        return torch.bucketize(probability.nan_to_num(-1.0), thresholds, right=True, out_int32=True)
    cell = (probability.nan_to_num(-1 / CELLS) * CELLS).to(torch.int32) + 1
    reached = _cell_table(thresholds.device).index_select(0, cell)
    unsure = (reached < 0).nonzero().squeeze(1)
    reached[unsure] = torch.bucketize(probability[unsure], thresholds, right=True, out_int32=True)
    return reached


def _counts(index: Tensor, bins: int) -> Tensor:
    """How often each of 0 to bins - 1 occurs in `index`: (bins,) int64."""
    index = index.flatten()
    if index.device.type == "cpu":
        return torch.bincount(index, minlength=bins)
    # bincount would read the largest index from the device.
    return index.new_zeros(bins, dtype=torch.int64).scatter_add_(0, index.long(), torch.ones_like(index).long())


@lru_cache(maxsize=8)
def _cell_table(device: torch.device) -> Tensor:
    """Number of thresholds up to each cell, int32, -1 if a threshold is inside the cell; entry 0 is for NaN."""
    with torch.inference_mode(False):
        thresholds = pr_thresholds()
        lowest = torch.arange(CELLS + 1, dtype=torch.float32) / CELLS
        highest = torch.nextafter(lowest + 1 / CELLS, torch.tensor(-1.0))
        at_lowest, at_highest = (torch.bucketize(x, thresholds, right=True, out_int32=True) for x in (lowest, highest))
        table = torch.where(at_lowest == at_highest, at_lowest, -1)
        return torch.cat([table.new_zeros(1), table]).to(device)


class MaskIoU(Metric):
    """Mean over frames of the intersection over union of object masks (s4, ms3).

    A pixel is predicted as object where its probability is above 0.5. A frame without object scores the share of
    pixels correctly predicted as background.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    iou_sum: Tensor
    frames: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("iou_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("frames", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, frame_flag: Tensor | None = None) -> None:
        """Add frames.

        Args:
            logits: (N, 1, H, W), any float dtype.
            target: (N, H, W), non-zero = object.
            frame_flag: (N,), 0 = ignore this frame.
        """
        logits, target = _binary(logits, target, frame_flag)
        predicted = logits.float().sigmoid() > 0.5
        intersection = (predicted & target).sum((1, 2))
        union = (predicted | target).sum((1, 2))
        pixels = target[0].numel() if len(target) else 1
        # Without object the union is the prediction, and the rest is true negative.
        with_object = target.flatten(1).any(1)
        iou = torch.where(with_object, intersection / union.double(), (pixels - union) / float(pixels))
        self.iou_sum += iou.sum(dtype=torch.float64)
        self.frames += len(iou)

    def compute(self) -> Tensor:
        """mIoU, a scalar in [0, 1]; NaN without frames."""
        return (self.iou_sum / self.frames).float()


class FScore(Metric):
    """Maximal F (beta^2 = 0.3) over 255 thresholds of the frames' mean F curve (s4, ms3), in two ways.

    Frames without object are left out. The maximum is taken after the mean, so it depends on which frames are averaged:
    AVSBench takes it per batch and averages over batches, so that the score depends on the batch size (published:
    batches of 2 clips in the order of the table). `f_score` is the maximum of one curve over the whole set.

    A batch is one call of `update`, or the frames with the same `batch_index`: with `batch_index = clip_index // 2`,
    any batch size and number of processes give AVSBench's score.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    batches: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("batches", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Remove all frames."""
        super().reset()
        # One row per batch: index, frames with object, sum of their curves. The empty first block gives processes
        # without frames a tensor of the same dtype and width to gather.
        self.batches.append(torch.zeros(0, 2 + NUM_THRESHOLDS, dtype=torch.float64, device=self.device))

    def update(
        self, logits: Tensor, target: Tensor, frame_flag: Tensor | None = None, batch_index: Tensor | None = None
    ) -> None:
        """Add frames.

        Args:
            logits: (N, 1, H, W), any float dtype.
            target: (N, H, W), non-zero = object.
            frame_flag: (N,), 0 = ignore this frame.
            batch_index: (N,) integers from 0, the batch of each frame, across updates and processes. Default: these N
                frames are one batch.
        """
        if batch_index is None:
            index = torch.full((len(logits),), -1)  # -1: not merged with others
        elif tuple(batch_index.shape) == (len(logits),):
            index = batch_index
        else:
            raise ValueError(f"batch_index of shape {tuple(batch_index.shape)} does not fit {len(logits)} frames")
        if frame_flag is not None:
            index = index[frame_flag.to(index.device) != 0]
        logits, target = _binary(logits, target, frame_flag)
        if len(logits) == 0:
            return
        curves = frame_f_curves(logits.float().sigmoid(), target)
        with_object = target.flatten(1).any(1).double()
        numbers, row = (x.to(curves.device, non_blocking=True) for x in index.unique(return_inverse=True))
        block = curves.new_zeros(len(numbers), 2 + NUM_THRESHOLDS)
        block[:, 0] = numbers
        block[:, 1:].index_add_(0, row, torch.cat([with_object[:, None], curves * with_object[:, None]], 1))
        self.batches.append(block)

    def compute(self) -> dict[str, Tensor]:
        """`f_score` of the whole set and `f_score_per_batch`, AVSBench's mean over batches: scalars in [0, 1].

        A batch without any object counts as 0 in AVSBench's mean, as published. NaN without frames.
        """
        batches = dim_zero_cat(self.batches)
        index, batches = batches[:, 0], batches[:, 1:]
        numbers, row = index[index >= 0].unique(return_inverse=True)
        merged = batches.new_zeros(len(numbers), batches.shape[1]).index_add_(0, row, batches[index >= 0])
        batches = torch.cat([batches[index < 0], merged])
        if not len(batches):
            nan = torch.full((), torch.nan, device=batches.device)
            return {"f_score": nan, "f_score_per_batch": nan.clone()}
        whole = batches.sum(0)
        per_batch = (batches[:, 1:] / batches[:, :1].clamp(min=1)).amax(1)
        return {
            "f_score": (whole[1:] / whole[0].clamp(min=1)).max().float(),
            "f_score_per_batch": per_batch.mean().float(),
        }


class SemanticScores(Metric):
    """IoU and F (beta^2 = 0.3) per class, averaged over the frames with the class in prediction or label (avss).

    Class 0 is background. AVSBench's published evaluation also counts the padded frames of short clips (background in
    prediction and label): without `frame_flag` the scores are those, with `frame_flag = vid_temporal_mask_flag` they
    are over real frames. They differ in class 0 only.

    Args:
        num_classes: K, background included.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    iou_sum: Tensor
    f_sum: Tensor
    frames: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(f"{num_classes} class: at least 2 are needed, background included")
        self.num_classes = num_classes
        self.add_state("iou_sum", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("f_sum", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("frames", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, frame_flag: Tensor | None = None) -> None:
        """Add frames.

        Args:
            logits: (N, K, H, W), any float dtype.
            target: (N, H, W) class indices.
            frame_flag: (N,), 0 = ignore this frame.

        Raises:
            ValueError: shapes that do not match, or a label outside 0..K-1.
        """
        if logits.ndim != 4 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits of shape {tuple(logits.shape)}, expected (N, {self.num_classes}, H, W)")
        logits, target = _flagged(logits, target, frame_flag, classes=self.num_classes)
        n, k = logits.shape[:2]
        if n == 0:
            return
        first = torch.arange(n, device=logits.device)[:, None] * k
        label = target.long().flatten(1)
        # max gives the indices of argmax, three times as fast on a CPU
        predicted = first + logits.max(1).indices.flatten(1)  # (N, H*W): frame * K + class
        label = first + label

        def pixels(index: Tensor) -> Tensor:
            return _counts(index, n * k + 1)[:-1].view(n, k).double()

        intersection = pixels(torch.where(predicted == label, label, n * k))
        in_prediction, in_label = pixels(predicted), pixels(label)
        union = in_prediction + in_label - intersection
        self.iou_sum += (intersection / union).nan_to_num(0.0).sum(0)
        self.f_sum += f_beta(intersection / in_prediction, intersection / in_label).sum(0)
        self.frames += (union > 0).sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Scores in [0, 1].

        Returns:
            `miou` and `f_score`: mean over classes; classes without frames count as 0. `miou_foreground` and
            `f_score_foreground`: without class 0, the background. `miou_published_no_background` and
            `f_score_published_no_background`: AVSBench's score of that name, which drops the *last* class instead.
            `iou_per_class` and `f_per_class`: (K,). `frames_per_class`: (K,) int64, the number of frames of each mean.
        """
        frames = self.frames.clamp(min=1)
        iou, f = (self.iou_sum / frames).float(), (self.f_sum / frames).float()
        return {
            "miou": iou.mean(),
            "f_score": f.mean(),
            "miou_foreground": iou[1:].mean(),
            "f_score_foreground": f[1:].mean(),
            "miou_published_no_background": iou[:-1].mean(),
            "f_score_published_no_background": f[:-1].mean(),
            "iou_per_class": iou,
            "f_per_class": f,
            "frames_per_class": self.frames.clone(),
        }


def _flagged(
    logits: Tensor, target: Tensor, frame_flag: Tensor | None, classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits and target of the counted frames, after checking shapes and, with `classes`, labels.

    Flags and targets on the CPU are read there, so that nothing waits for the logits' device.
    """
    if target.ndim == 4 and target.shape[1] == 1:
        target = target.squeeze(1)
    if target.shape != (len(logits), *logits.shape[2:]):
        raise ValueError(f"target of shape {tuple(target.shape)} does not fit logits {tuple(logits.shape)}")
    logits = logits.detach()
    if frame_flag is not None:
        if frame_flag.shape != (len(logits),):
            raise ValueError(f"frame_flag of shape {tuple(frame_flag.shape)} does not fit {len(logits)} frames")
        counted = frame_flag.nonzero().squeeze(1)
        if len(counted) < len(logits):
            target = target[counted.to(target.device)]
            logits = logits[counted.to(logits.device, non_blocking=True)]
    if classes is not None and target.numel():
        lowest, highest = (int(label) for label in target.aminmax())
        if lowest < 0 or highest >= classes:
            raise ValueError(f"labels are from {lowest} to {highest}, but classes are from 0 to {classes - 1}")
    return logits, target.to(logits.device, non_blocking=True)


def _binary(logits: Tensor, target: Tensor, frame_flag: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits (N, H, W) and bool target (N, H, W) of the counted frames."""
    if logits.ndim != 4 or logits.shape[1] != 1:
        raise ValueError(f"logits of shape {tuple(logits.shape)}, expected (N, 1, H, W)")
    logits, target = _flagged(logits, target, frame_flag)
    return logits.squeeze(1), target != 0


class PaintedShare(Metric):
    """Mean over frames of the share of pixels that are predicted as object, whatever the label.

    With a sound that none of the visible objects makes, this is AVSBench-Robust's false positive rate (FPR, arXiv
    2502.00358): nothing should be painted. A pixel is painted where its probability is above 0.5, or for several
    classes where the most probable one is not the background, class 0.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    share_sum: Tensor
    frames: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("share_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("frames", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, frame_flag: Tensor | None = None) -> None:
        """Add frames.

        Args:
            logits: (N, K, H, W), any float dtype.
            target: (N, H, W); only its shape is read.
            frame_flag: (N,), 0 = ignore this frame.
        """
        logits, _ = _flagged(logits, target, frame_flag)
        if len(logits):
            self.share_sum += _predicted(logits).bool().double().mean((1, 2)).sum()
        self.frames += len(logits)

    def compute(self) -> Tensor:
        """The share, a scalar in [0, 1]; NaN without frames."""
        return (self.share_sum / self.frames).float()


class DatasetScores(Metric):
    """J and F of the CAVP family (Chen et al., CVPR 2024; DDESeg, BYOAVP): pixels are summed over the whole data set.

    One intersection and one union per class, over all pixels of all frames, so that large objects and frames weigh
    more, and empty frames count as background; AVSBench averages over frames instead. The same weights score higher
    here, and the two conventions cannot be compared. J is the mean IoU and F the mean F (beta^2 = 0.3) over the
    classes that occur, background included: with one kind of object, those are background and object.

    Args:
        num_classes: K; 1 for background and object by one logit.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    intersection: Tensor
    in_prediction: Tensor
    in_label: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = max(2, num_classes)
        for name in ("intersection", "in_prediction", "in_label"):
            self.add_state(name, torch.zeros(self.num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, frame_flag: Tensor | None = None) -> None:
        """Add frames.

        Args:
            logits: (N, K, H, W), any float dtype.
            target: (N, H, W) class indices; for one logit, non-zero = object.
            frame_flag: (N,), 0 = ignore this frame.
        """
        logits, target = _flagged(logits, target, frame_flag)
        label = (target != 0).long() if logits.shape[1] == 1 else target.long()
        predicted = _predicted(logits)
        for total, index in (
            (self.intersection, torch.where(predicted == label, label, self.num_classes)),
            (self.in_prediction, predicted),
            (self.in_label, label),
        ):
            total += _counts(index, self.num_classes + 1)[:-1]

    def compute(self) -> dict[str, Tensor]:
        """`miou_dataset` (J), `f_dataset` (F) and `jf_dataset`, their mean: scalars in [0, 1]; NaN without frames."""
        union = self.in_prediction + self.in_label - self.intersection
        occurs = union > 0
        hit = self.intersection[occurs].double()
        iou = (hit / union[occurs]).mean()
        f = f_beta(hit / self.in_prediction[occurs], hit / self.in_label[occurs]).mean()
        return {"miou_dataset": iou.float(), "f_dataset": f.float(), "jf_dataset": ((iou + f) / 2).float()}


def balanced_score(positive: float, negative: float) -> float:
    """Harmonic mean of `positive` and `1 - negative`: G-mIoU and G-F of AVSBench-Robust (arXiv 2502.00358).

    The paper's code does not contain the formula; this one gives its published table to the digit. A model that ignores
    the sound scores as well on a wrong sound as on the clip's own: mIoU 86.2 and 86.2 give G-mIoU 23.79.

    Args:
        positive: score with the clips' own sound, in [0, 1].
        negative: score, against the same masks, with a sound that none of the visible objects makes.

    Returns:
        In [0, 1]; 0 where both terms are 0.
    """
    rejected = 1 - negative
    return 2 * positive * rejected / (positive + rejected) if positive + rejected > 0 else 0.0


def _predicted(logits: Tensor) -> Tensor:
    """Class of every pixel: (N, K, H, W) -> (N, H, W) int64; for K = 1, 1 where the probability is above 0.5."""
    if logits.shape[1] == 1:
        return (logits.squeeze(1).float().sigmoid() > 0.5).long()
    return logits.max(1).indices
