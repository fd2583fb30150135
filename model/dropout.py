"""Dropout whose mask is cheap on a CPU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al., 2014) that draws four decisions from each 64-bit number of a CPU's generator.

    PyTorch draws one at a time, and keeps a mask of floats for the backward pass: in a training step of the full model
    that is a seventh of the time. The probability is met to 1/65536. On other devices, and compiled, it is PyTorch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Zero elements with probability p and scale the others by 1 / (1 - p), in training."""
        if (
            not self.training
            or self.p == 0
            or self.p == 1
            or input.device.type != "cpu"
            or torch.compiler.is_compiling()
        ):
            return F.dropout(input, self.p, self.training)
        draws = torch.empty(math.ceil(input.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
        keep = draws.view(torch.int16)[: input.numel()] >= round(self.p * 2**16) - 2**15
        return torch.where(keep.view(input.shape), input, 0) * (1 / (1 - self.p))
