"""Dropout with a fast kernel for CPUs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.library import has_kernel


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al., 2014); on a CPU by a counter-based generator, where the op is compiled.

    PyTorch draws element by element on a CPU and stores a float mask, 13 % of a training step of the full model. The
    kernel (ops/src/dropout.h) derives the mask from a seed and each element's index, again in the backward pass: 1 %.
    The probability is exact to 1/65536. Elsewhere, and when compiling, this is PyTorch's dropout.
    """

    def forward(self, input: Tensor) -> Tensor:
        """In training, zero elements with probability p and scale the others by 1 / (1 - p)."""
        if not self.training or not 0 < self.p < 1 or not _supported(input):
            return F.dropout(input, self.p, self.training)
        seed = int(torch.randint(2**63 - 1, ()).item())
        return _CounterDropout.apply(input, self.p, seed)


def _supported(input: Tensor) -> bool:
    on_cpu = input.device.type == "cpu" and input.dtype != torch.float64
    return on_cpu and not torch.compiler.is_compiling() and has_kernel("cpu")


class _CounterDropout(torch.autograd.Function):
    """The seed determines the mask, so the gradient is masked by the same call."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        out: Tensor = torch.ops.modat.dropout(input, p, seed)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _CounterDropout.apply(grads[0], ctx.p, ctx.seed), None, None
