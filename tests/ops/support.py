"""Inputs of the operators, and their results beside those of the definition in float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import ops
from ops.reference import ms_deform_attn_fused_torch, ms_deform_attn_torch

BOUND = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Relative error of a kernel that rounds its output and the gradient of value to the dtype."""
FORMS = {
    "plain": (ops.ms_deform_attn, ms_deform_attn_torch, ("locations", "weights")),
    "fused": (ops.ms_deform_attn_fused, ms_deform_attn_fused_torch, ("reference", "offsets", "logits")),
}
Shapes = tuple[tuple[int, int], ...]
Change = Callable[[Tensor], Tensor]


def relative(got: Tensor, true: Tensor) -> float:
    """Relative error in the 2-norm. Infinite unless NaN and infinities are where they should be."""
    got, true = got.double().cpu(), true.double().cpu()
    finite = true.isfinite()
    if not torch.equal(got[~finite].nan_to_num(7, 8, 9), true[~finite].nan_to_num(7, 8, 9)):
        return float("inf")
    error = float((got[finite] - true[finite]).norm() / true[finite].norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def draw(shapes: Shapes, batch=2, queries=6, heads=2, channels=8, points=3, seed=0) -> dict[str, Tensor]:
    """Float64 inputs whose samples keep off pixel centres, where the gradient of a location jumps."""
    generator = torch.Generator().manual_seed(seed)
    levels = len(shapes)
    size = (batch, queries, heads, levels, points)
    spans = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64)
    reference = torch.rand(batch, queries, levels, 2, generator=generator, dtype=torch.float64)
    pixels = (torch.rand(*size, 2, generator=generator, dtype=torch.float64) * 1.5 - 0.25) * (spans[:, None] + 1) - 1
    pixels = pixels.floor() + 0.05 + 0.9 * torch.rand(pixels.shape, generator=generator, dtype=torch.float64)
    offsets = pixels + 0.5 - (reference * spans)[:, :, None, :, None]
    logits = torch.randn(size, generator=generator, dtype=torch.float64)
    return {
        "value": torch.randn(
            batch, sum(h * w for h, w in shapes), heads, channels, generator=generator, dtype=torch.float64
        ),
        "reference": reference,
        "offsets": offsets,
        "logits": logits,
        "locations": (pixels + 0.5) / spans[:, None],
        "weights": logits.flatten(-2).softmax(-1).view_as(logits),
        "grad": torch.randn(batch, queries, heads * channels, generator=generator, dtype=torch.float64),
    }


def outcome(function, shapes, tensors, grad, **keywords) -> list[Tensor]:
    """Output, then the gradient of each tensor."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(leaves[0], shapes, *leaves[1:], **keywords)
    out.backward(grad.to(out.device, out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def errors(data, shapes, dtype, device, form, change: Change = lambda tensor: tensor) -> dict[str, float]:
    """Relative errors of output and gradients; `change` is applied to the inputs of the kernel and to the gradient."""
    work = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    kernel, definition, names = FORMS[form]
    inputs = [data["value"].to(dtype), *(data[name].to(work) for name in names)]
    grad = data["grad"].to(dtype)
    true = outcome(definition, shapes, [tensor.double() for tensor in inputs], grad)
    got = outcome(kernel, shapes, [change(t.to(device)) for t in inputs], change(grad.to(device)), backend=device)
    assert got[0].dtype == got[1].dtype == dtype
    pairs = zip(("out", "value", *names), got, true, strict=True)
    return {name: relative(a, b) for name, a, b in pairs}


def agree(data, shapes, dtype, device, bound, change: Change = lambda tensor: tensor) -> None:
    """Both forms are within `bound` of the definition."""
    for form in FORMS:
        found = errors(data, shapes, dtype, device, form, change)
        assert max(found.values()) < bound, (form, found)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def among_nan(tensor: Tensor) -> Tensor:
    """The same numbers, as rows of a larger tensor of NaN that starts at an odd element."""
    wide = (tensor.shape[0] * 2, tensor.shape[1] + 3, *tensor.shape[2:])
    storage = torch.full((1 + math.prod(wide),), float("nan"), dtype=tensor.dtype, device=tensor.device)
    return storage[1:].view(wide)[::2, 2:-1].copy_(tensor)


def frames_apart(tensor: Tensor) -> Tensor:
    """One element between frames: the first is aligned, the second is not."""
    step = tensor[0].numel() + 1
    storage = tensor.new_full((tensor.shape[0] * step,), float("nan"))
    return storage.as_strided(tensor.shape, (step, *tensor[0].contiguous().stride())).copy_(tensor)
