"""Activations that are made anew in the backward pass instead of being kept."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

Out = TypeVar("Out")
_within: ContextVar[bool] = ContextVar("within", default=False)


def recomputed(function: Callable[..., Out], *inputs: object, enable: bool = True) -> Out:
    """Call a function, keeping nothing for the backward pass but its inputs.

    The backward pass computes it again, with the same random draws, up to the last tensor that a gradient needs: a
    product at its end, of which only the factors are needed, is not done twice. What is recomputed as part of something
    larger is not recomputed once more by itself.

    Args:
        function: of tensors and other things.
        inputs: its arguments.
        enable: False calls the function as it is.
    """
    if not enable or not torch.is_grad_enabled() or _within.get():
        return function(*inputs)
    call = function if torch.compiler.is_compiling() else _outermost(function)
    out: Out = checkpoint(call, *inputs, use_reentrant=False)
    return out


def _outermost(function: Callable[..., Out]) -> Callable[..., Out]:
    def call(*inputs: object) -> Out:
        token = _within.set(True)
        try:
            return function(*inputs)
        finally:
            _within.reset(token)

    return call
