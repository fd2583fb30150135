"""Float32, bfloat16 and float16."""

import torch
from torch import nn

from model.fusion import CSA
from model.layers.attention import MultiheadAttention
from model.moe import ChannelExperts, SpatialExperts
from utils.errors import ConfigError

AUTOCAST = {"bf16": torch.bfloat16, "16": torch.float16}
"""`process.precision` -> what autocast computes in; 32 goes without."""


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Store what autocast rounds in each call as rounded: weights of products and convolutions.

    The answers stay the same, and reading and rounding all weights for each batch falls away. What autocast leaves in
    float32 stays: norms, embeddings, the router, and the branch scores, whose weights are subtracted first.
    """
    subtracted = {module.branch_score for module in model.modules() if isinstance(module, CSA)}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in subtracted:
            module.to(dtype)
        elif isinstance(module, MultiheadAttention | ChannelExperts | SpatialExperts):
            for name, parameter in module.named_parameters(recurse=False):
                if not name.endswith("bias"):  # an expert's is added in float32
                    parameter.data = parameter.data.to(dtype)


def check_precision(precision: str, device: str) -> None:
    """See that a device knows a precision.

    Raises:
        ConfigError: it does not.
    """
    if precision == "16" and device == "cpu":
        raise ConfigError("process.precision=16 needs a GPU; bf16 runs on a CPU as well.")
