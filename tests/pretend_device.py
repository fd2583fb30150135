"""A device whose every synchronisation is counted: tensors lie on the CPU and say that they do not.

On a GPU, reading a value (`.item()`, `bool(x)`, `nonzero`, a boolean index) makes the processor wait for all work that
was queued before. On a CPU nothing of this can be seen in the time, so it is counted here, operator by operator.
"""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torchmetrics import Metric

DEVICE = torch.device("meta")  # one that is no CPU, and on which autograd needs no stream
ROOT = Path(__file__).resolve().parents[1]
READS = {
    "_local_scalar_dense",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
}
"""Operators whose result, or its shape, has to be known on the host."""


class OnDevice(Tensor):
    """A tensor of the pretended device; its values are in `inner`, on the CPU."""

    inner: Any

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        wrapper: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )
        wrapper.inner = inner
        return wrapper

    def new_tensor(self, data: Any, *_: Any, **__: Any) -> "OnDevice":
        """PyTorch fills it without an operator."""
        return OnDevice(torch.tensor(data, dtype=self.dtype))

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise RuntimeError(f"{func} outside PretendDevice")


class PretendDevice(TorchDispatchMode):
    """Runs operators of the device on the CPU, and counts those that would make the host wait.

    Attributes:
        waits: (operator, place in the project) -> times.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        found: list[OnDevice] = []
        elsewhere: list[Tensor] = []

        def unwrap(x: Any) -> Any:
            if isinstance(x, OnDevice):
                found.append(x)
                return x.inner
            if isinstance(x, Tensor) and x.dim():
                elsewhere.append(x)
            return x

        plain_args, plain_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
        device = kwargs.get("device")
        on_device = bool(found) if device is None else torch.device(device) == DEVICE
        if device is not None:
            plain_kwargs["device"] = torch.device("cpu")
        name = func.overloadpacket.__name__
        if name == "_fused_sdp_choice":
            return 0  # the formula: kernels are chosen by device
        if found and elsewhere and name not in ("copy_", "index", "_unsafe_index"):
            raise RuntimeError(f"{name} of tensors on two devices")
        if found and (name in READS or not on_device or _selects_by_truth(name, plain_args)):
            self.waits[name, _place()] += 1
        out = func(*plain_args, **plain_kwargs)
        if name == "_to_copy" and out is plain_args[0]:
            out = out.clone()
        if not on_device:
            return out
        same = {id(wrapper.inner): wrapper for wrapper in found}  # of operators in place

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return same[id(x)] if id(x) in same else OnDevice(x)

        return tree_map(wrap, out)


def move(module: nn.Module) -> nn.Module:
    """Put a module on the pretended device, in place; within a `PretendDevice`."""
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                moved = OnDevice(parameter.detach())
                child._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in list(child._buffers.items()):
            if buffer is not None:
                child._buffers[name] = OnDevice(buffer)
        if isinstance(child, Metric):
            child._device = DEVICE
            states = {name: default for name, default in child._defaults.items() if isinstance(default, Tensor)}
            for name, default in states.items():
                child._defaults[name] = OnDevice(default)
                setattr(child, name, OnDevice(getattr(child, name)))
    return module


def _selects_by_truth(name: str, args: Any) -> bool:
    """Whether an index is boolean, so that the shape of the result depends on its values."""
    if name not in ("index", "index_put", "index_put_", "_unsafe_index"):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _place() -> str:
    """The innermost line of the project, this file excluded."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path != Path(__file__) and path.is_relative_to(ROOT) and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.name}"
    return "elsewhere"
