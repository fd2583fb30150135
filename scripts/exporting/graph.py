"""A model as one graph of PyTorch's own operators, for any number of frames."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes

from model.avs_model import AVSModel
from ops import MSDeformAttn
from utils.errors import ConfigError

UNSUPPORTED = (RuntimeError, TypeError, ValueError, AssertionError, KeyError, AttributeError)
"""What PyTorch's exporters raise for a model that they cannot express."""


class Inputs(NamedTuple):
    """Sizes of a model's inputs.

    Attributes:
        log_mel: shape of one frame's log-mel.
        size: (height, width) of frames, pixels.
        multiple: the number of frames is a multiple of it: T if frames influence each other, else 1.
    """

    log_mel: tuple[int, ...]
    size: tuple[int, int]
    multiple: int

    def example(self, frames: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random log-mel (N, *log_mel) and frames (N, 3, H, W), float32.

        The log-mel is within (0, 1): zeros alone would be digital silence.
        """
        draw = torch.Generator().manual_seed(seed)
        log_mel = torch.rand(frames, *self.log_mel, generator=draw)
        return log_mel, torch.randn(frames, 3, *self.size, generator=draw)


class Logits(nn.Module):
    """The logits of a model in evaluation, computed by PyTorch's own operators.

    Multi-scale deformable attention is its definition by grid_sample (ops/reference.py), so that the graph does not
    need the compiled operators.

    Args:
        model: it is copied, and stays as it is.
    """

    def __init__(self, model: AVSModel) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, MSDeformAttn):
                module.backend = "torch"

    def forward(self, log_mel: Tensor, frames: Tensor) -> Tensor:
        """Log-mel (N, ...) and ImageNet-normalised frames (N, 3, H, W) -> logits (N, K, H, W)."""
        logits: Tensor = self.model(log_mel, frames).logits
        return logits


def trace(model: AVSModel, inputs: Inputs) -> ExportedProgram:
    """Trace a model; the number of frames stays open, height and width are fixed.

    Args:
        model: evaluation mode is set on a copy.
        inputs: its inputs.

    Raises:
        ConfigError: torch.export cannot express the model.
    """
    network = Logits(model)
    # Sizes of 0 and 1 would be taken for constants: trace with two frames or clips.
    example = inputs.example(2 * inputs.multiple)
    frames = Dim("frames", min=1) if inputs.multiple == 1 else inputs.multiple * Dim("clips", min=1)
    dynamic = {"log_mel": {0: frames}, "frames": {0: frames}}
    try:
        # Reshapes between frames and clips would else exclude a single clip.
        coupled = symbolic_shapes.patch(backed_size_oblivious=inputs.multiple > 1)  # type: ignore[attr-defined]
        with torch.no_grad(), coupled:
            return torch.export.export(network, example, dynamic_shapes=dynamic)
    except UNSUPPORTED as error:
        raise ConfigError(f"torch.export cannot express this model: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of an exporter's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
