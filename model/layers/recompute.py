"""Activation checkpointing: recompute activations in the backward pass instead of storing them."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

Out = TypeVar("Out")
_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


def recompute(function: Callable[..., Out], *inputs: object, enable: bool = True) -> Out:
    """Call a function and store only its inputs for the backward pass.

    The backward pass runs the function again with the same random draws, up to the last tensor that a gradient needs (a
    final matrix product needs only its factors). Nested calls are recomputed once, as part of the outermost one.

    Args:
        function: of tensors and other arguments.
        inputs: its arguments.
        enable: False calls the function directly.

    Returns:
        The function's output.
    """
    if not enable or not torch.is_grad_enabled() or _recomputing.get():
        return function(*inputs)
    call = function if torch.compiler.is_compiling() else _outermost(function)
    out: Out = checkpoint(call, *inputs, use_reentrant=False)
    return out


def _outermost(function: Callable[..., Out]) -> Callable[..., Out]:
    def call(*inputs: object) -> Out:
        token = _recomputing.set(True)
        try:
            return function(*inputs)
        finally:
            _recomputing.reset(token)

    return call
