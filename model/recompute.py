"""Activations that are made anew in the backward pass instead of being kept."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

Out = TypeVar("Out")


def recomputed(function: Callable[..., Out], *inputs: object, enable: bool = True) -> Out:
    """Call a function, keeping nothing for the backward pass but its inputs.

    The backward pass computes it again, with the same random draws, up to the last tensor that a gradient needs: a
    product at its end, of which only the factors are needed, is not done twice.

    Args:
        function: of tensors and other things.
        inputs: its arguments.
        enable: False calls the function as it is.
    """
    if not enable or not torch.is_grad_enabled():
        return function(*inputs)
    out: Out = checkpoint(function, *inputs, use_reentrant=False)
    return out
