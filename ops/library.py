"""Registration of the compiled operators with PyTorch: loaded on demand, with fake kernels for tracing."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ops import build


@functools.cache
def has_kernel(device_type: str) -> bool:
    """Whether a compiled kernel for "cpu" or "cuda" is available; builds and loads it in the first call."""
    if build.load("cpu").path is None:
        return False
    _register_shapes()
    return device_type == "cpu" or (device_type == "cuda" and build.load("cuda").path is not None)


@functools.cache
def _register_shapes() -> None:
    @torch.library.register_fake("modat::ms_deform_attn")
    def _(value: Tensor, spatial_shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
        return _output(value, locations)

    @torch.library.register_fake("modat::ms_deform_attn_fused")
    def _(value: Tensor, spatial_shapes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return _output(value, offsets)

    @torch.library.register_fake("modat::ms_deform_attn_backward")
    def _(
        grad: Tensor, value: Tensor, spatial_shapes: list[int], locations: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _like(value), _like(locations), _like(weights)

    @torch.library.register_fake("modat::ms_deform_attn_fused_backward")
    def _(
        grad: Tensor, value: Tensor, spatial_shapes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _like(value), _like(offsets), _like(logits)

    @torch.library.register_fake("modat::dropout")
    def _(input: Tensor, p: float, seed: int) -> Tensor:
        return _like(input)


def _output(value: Tensor, samples: Tensor) -> Tensor:
    return value.new_empty((value.shape[0], samples.shape[1], value.shape[2] * value.shape[3]))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
