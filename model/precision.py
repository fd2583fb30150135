"""Mixed precision: bfloat16 and float16."""

import torch
from torch import nn

from model.fusion import DualAttentionMoE
from model.layers.attention import MultiheadAttention
from model.moe import ChannelExperts, SpatialExperts
from utils.errors import ConfigError

AUTOCAST = {"bf16": torch.bfloat16, "16": torch.float16}
"""`process.precision` -> dtype of autocast; '32' runs without autocast."""


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights that autocast would cast in each call, those of matrix products and convolutions, for inference.

    Results stay the same, without the cast of all weights per batch. Weights that autocast keeps in float32 stay so:
    norms, embeddings, the router, and the branch scores, whose rows are subtracted before the product.

    Args:
        model: changed in place.
        dtype: of autocast.
    """
    subtracted = {module.branch_score for module in model.modules() if isinstance(module, DualAttentionMoE)}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in subtracted:
            module.to(dtype)
        elif isinstance(module, MultiheadAttention | ChannelExperts | SpatialExperts):
            for name, parameter in module.named_parameters(recurse=False):
                if not name.endswith("bias"):  # experts add their bias in float32
                    parameter.data = parameter.data.to(dtype)


def check_precision(precision: str, device: str) -> None:
    """Check that a device supports a precision.

    Raises:
        ConfigError: it does not.
    """
    if precision == "16" and device == "cpu":
        raise ConfigError("process.precision=16 needs a GPU; use bf16 on a CPU.")
