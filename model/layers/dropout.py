"""Dropout that costs little on a CPU."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.library import has_kernel


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al., 2014), on a CPU by a counter-based generator.

    PyTorch draws one decision at a time, and keeps a mask of floats for the backward pass: in a training step of the
    full model that is a seventh of the time. Here one number of PyTorch's generator seeds a whole mask, which is made
    anew in the backward pass. Without the compiled kernel, four decisions are taken from each 64-bit draw. The
    probability is met to 1/65536 either way. On other devices, and compiled, it is PyTorch's.
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
        if input.dtype != torch.float64 and has_kernel("cpu"):
            seed = int(torch.randint(2**63 - 1, ()).item())
            return _CounterDropout.apply(input, self.p, seed)
        draws = torch.empty(math.ceil(input.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
        keep = draws.view(torch.int16)[: input.numel()] >= round(self.p * 2**16) - 2**15
        return torch.where(keep.view(input.shape), input, 0) * (1 / (1 - self.p))


class _CounterDropout(torch.autograd.Function):
    """The mask follows from the seed: the gradient is dropped as the input was."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        out: Tensor = torch.ops.modat.dropout(input, p, seed)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _CounterDropout.apply(grads[0], ctx.p, ctx.seed), None, None
