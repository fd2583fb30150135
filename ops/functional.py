"""The two public functions: argument checks, choice of the backend, call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ops import build
from ops.library import has_kernel
from ops.reference import ms_deform_attn_fused_torch, ms_deform_attn_torch

Backend = Literal["auto", "cpu", "cuda", "torch"]
SpatialShapes = Sequence[tuple[int, int]] | Tensor
LOW_PRECISION = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *LOW_PRECISION)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, equation 2).

    Args:
        value: (N, L, M, D) features of all levels, concatenated, row-major; float32, float64, bfloat16 or
            float16.
        spatial_shapes: (height, width) per level, tuples or an integer tensor (levels, 2); their areas sum to L.
            A GPU tensor is copied to the host in each call: prefer tuples.
        sampling_locations: (N, Q, M, levels, points, 2), x then y; 0 and 1 are the outer edges of a level, with zeros
            outside.
        attention_weights: (N, Q, M, levels, points).
        backend: "auto" uses the compiled kernel of the device if available, else "torch".

    Returns:
        (N, Q, M * D) in the dtype of `value`. Sums are float32 (float64 for float64). With bfloat16 or float16 values,
        locations and weights are converted to float32.

    Raises:
        ValueError: shapes or devices do not match.
        TypeError: dtypes do not match.
        RuntimeError: the given backend is not available.
    """
    shapes = _as_tuples(spatial_shapes)
    _check_value(value, shapes)
    _check_samples(value, shapes, sampling_locations, attention_weights, ("sampling_locations", "attention_weights"))
    locations, weights = _to_work_dtype(value, sampling_locations), _to_work_dtype(value, attention_weights)
    if _resolve(backend, value.device.type):
        flat = [size for shape in shapes for size in shape]
        return torch.ops.modat.ms_deform_attn(value, flat, locations, weights)
    return ms_deform_attn_torch(value, shapes, locations, weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """`ms_deform_attn` from the outputs of the module's projections: offsets and logits.

    The weights are the softmax of the logits over levels and points; a location is reference point + offset / (width,
    height) of its level. The compiled kernels include both, forward and backward.

    Args:
        value: (N, L, M, D).
        spatial_shapes: (height, width) per level.
        reference_points: (Q, 2), (Q, levels, 2) or (N, Q, levels, 2), x then y, in [0, 1].
        sampling_offsets: (N, Q, M, levels, points, 2) in pixels of each level.
        attention_logits: (N, Q, M, levels, points).
        backend: as for `ms_deform_attn`.

    Returns:
        (N, Q, M * D) in the dtype of `value`.

    Raises:
        ValueError: shapes or devices do not match.
        TypeError: dtypes do not match.
        RuntimeError: the given backend is not available.
    """
    shapes = _as_tuples(spatial_shapes)
    _check_value(value, shapes)
    _check_samples(value, shapes, sampling_offsets, attention_logits, ("sampling_offsets", "attention_logits"))
    reference = _to_work_dtype(value, _expand_reference(reference_points, sampling_offsets))
    offsets, logits = _to_work_dtype(value, sampling_offsets), _to_work_dtype(value, attention_logits)
    if _resolve(backend, value.device.type):
        flat = [size for shape in shapes for size in shape]
        points = reference.expand(value.shape[0], offsets.shape[1], len(shapes), 2)
        return torch.ops.modat.ms_deform_attn_fused(value, flat, points, offsets, logits)
    return ms_deform_attn_fused_torch(value, shapes, reference, offsets, logits)


def _as_tuples(spatial_shapes: SpatialShapes) -> tuple[tuple[int, int], ...]:
    rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    try:
        shapes = tuple((height, width) for height, width in rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"spatial_shapes must hold (height, width) pairs, got {spatial_shapes!r}") from error
    if not shapes or any(height < 1 or width < 1 for height, width in shapes):
        raise ValueError(f"spatial_shapes needs at least one level, each at least 1 x 1, got {shapes}")
    return shapes


def _check_value(value: Tensor, shapes: tuple[tuple[int, int], ...]) -> None:
    if value.dim() != 4 or value.shape[2] < 1 or value.shape[3] < 1:
        raise ValueError(f"value must be (N, L, M, D) with M, D >= 1, got {tuple(value.shape)}")
    if value.dtype not in DTYPES:
        raise TypeError(f"value must be float32, float64, bfloat16 or float16, got {value.dtype}")
    area = sum(height * width for height, width in shapes)
    if value.shape[1] != area:
        raise ValueError(f"value has L = {value.shape[1]} rows, but spatial_shapes {shapes} add up to {area}")


def _check_samples(
    value: Tensor, shapes: tuple[tuple[int, int], ...], points: Tensor, weights: Tensor, names: tuple[str, str]
) -> None:
    head = (value.shape[0], points.shape[1] if points.dim() == 6 else -1, value.shape[2], len(shapes))
    if points.dim() != 6 or points.shape[4] < 1 or tuple(points.shape) != (*head, points.shape[4], 2):
        raise ValueError(
            f"{names[0]} must be (N, Q, M, levels, points, 2) with N = {head[0]}, M = {head[2]} of value and "
            f"levels = {head[3]} of spatial_shapes, got {tuple(points.shape)}"
        )
    if weights.shape != points.shape[:-1]:
        raise ValueError(
            f"{names[1]} must have the shape {tuple(points.shape[:-1])} of {names[0]} without its last axis, "
            f"got {tuple(weights.shape)}"
        )
    for name, tensor in zip(names, (points, weights), strict=True):
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}: move them to one device")
        if tensor.dtype != value.dtype and not (value.dtype in LOW_PRECISION and tensor.dtype == torch.float32):
            raise TypeError(
                f"{name} is {tensor.dtype}, value {value.dtype}: it must be the same, or float32 beside a "
                f"bfloat16 or float16 value"
            )


def _expand_reference(reference: Tensor, offsets: Tensor) -> Tensor:
    batch, queries, levels = offsets.shape[0], offsets.shape[1], offsets.shape[3]
    fits = {2: (queries, 2), 3: (queries, levels, 2), 4: (batch, queries, levels, 2)}
    if reference.dim() not in fits or tuple(reference.shape) != fits[reference.dim()]:
        known = ", ".join(str(shape) for shape in fits.values())
        raise ValueError(f"reference_points must have one of the shapes {known}, got {tuple(reference.shape)}")
    if reference.device != offsets.device:
        raise ValueError(f"reference_points is on {reference.device}, sampling_offsets on {offsets.device}")
    if reference.dim() == 2:
        return reference[None, :, None]  # (1, Q, 1, 2)
    return reference[None] if reference.dim() == 3 else reference


def _to_work_dtype(value: Tensor, tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if value.dtype in LOW_PRECISION else value.dtype)


@torch.compiler.assume_constant_result
def _resolve(backend: str, device_type: str) -> bool:
    """Whether to call a compiled kernel (True) or the definition; a constant to torch.compile."""
    if backend == "torch":
        return False
    if backend == "auto":
        return device_type in ("cpu", "cuda") and has_kernel(device_type)
    if backend not in ("cpu", "cuda"):
        raise ValueError(f"backend must be auto, cpu, cuda or torch, got {backend!r}")
    if backend != device_type:
        raise RuntimeError(f"backend {backend!r} cannot take tensors on {device_type}")
    if not has_kernel(device_type):
        reason = build.load("cpu").reason or build.load(device_type).reason
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    return True
