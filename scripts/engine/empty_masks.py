"""Whether a run can learn from clips with empty masks."""

import torch
from torch import nn

from dataloader import AudioVisualDataset

LEAST_GRADIENT = 0.01
"""Sum of the absolute gradient of an empty frame's mask loss, at logits of 0; of binary cross entropy it is 0.5."""


def unlearnable_negatives(dataset: AudioVisualDataset, criterion: nn.Module) -> str | None:
    """What to tell where a run has negative clips, and a mask loss without a gradient in empty masks, as dice is.

    Args:
        dataset: of the train split.
        criterion: of the run; one without the attribute `binary_loss` is taken to have a gradient.

    Returns:
        A sentence with the way out, or None.
    """
    loss = getattr(criterion, "binary_loss", None)
    if dataset.negatives is None or loss is None or dataset.num_classes > 1:
        return None
    logits = torch.zeros(1, 8, 8, requires_grad=True)
    loss(logits, torch.zeros(1, 8, 8)).sum().backward()
    if logits.grad is not None and float(logits.grad.abs().sum()) >= LEAST_GRADIENT:
        return None
    return (
        "dataset.train.negatives makes clips with empty masks, in which this mask loss has no gradient: "
        "set loss.mask_loss='bce_dice'."
    )
