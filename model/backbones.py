"""Picture backbones by timm: feature maps at 1/4, 1/8, 1/16 and 1/32 of the picture."""

from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from model.checkpoint import load_backbone
from utils.errors import ConfigError
from utils.registry import BACKBONES, suggestion

STRIDES = (4, 8, 16, 32)
PUBLISHED_NAMES = {"res50": "resnet50"}
"""Names in published configs -> names in timm."""


@BACKBONES.register_module()
class TimmBackbone(nn.Module):
    """Any timm network that gives feature maps at strides 4, 8, 16 and 32.

    Args:
        name: timm's name, or a published one (`res50`).
        init_weights_path: a file of pretrained weights (AVSBench's `pvt_v2_b5.pth`, `resnet50-19c8e357.pth`, or timm's
            own names), 'timm' for the weights that timm downloads, None for random ones.
        drop_path_rate: stochastic depth in training; None leaves timm's default.

    Attributes:
        channels: channels of the four maps.

    Raises:
        ConfigError: timm does not know the name, or the network lacks one of the strides.
    """

    def __init__(
        self, name: str, init_weights_path: str | Path | None = None, drop_path_rate: float | None = None
    ) -> None:
        super().__init__()
        timm_name = PUBLISHED_NAMES.get(name, name)
        if not timm.is_model(timm_name):
            known = [*PUBLISHED_NAMES, *timm.list_models(f"{timm_name[:5]}*")]
            raise ConfigError(f"model.backbone.type={name!r} is no network of timm's: {suggestion(name, known)}")
        options: dict[str, Any] = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
        try:
            network: Any = timm.create_model(
                timm_name, pretrained=init_weights_path == "timm", features_only=True, **options
            )
        except (RuntimeError, TypeError, AssertionError, AttributeError) as error:
            raise ConfigError(f"model.backbone.type={name!r} gives no feature maps: {error}") from error
        levels = {info["reduction"]: (index, info["num_chs"]) for index, info in enumerate(network.feature_info)}
        if not set(STRIDES) <= set(levels):
            raise ConfigError(
                f"model.backbone.type={name!r} has feature maps at strides {sorted(levels)}, and {STRIDES} are needed."
            )
        self.network = network
        self._levels = [levels[stride][0] for stride in STRIDES]
        self.channels = tuple(levels[stride][1] for stride in STRIDES)
        if init_weights_path not in (None, "timm"):
            load_backbone(self, init_weights_path)

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Pictures (N, 3, H, W) -> four maps (N, channels[l], H / stride, W / stride)."""
        maps = self.network(frames)
        return [_channels_first(maps[level], self.channels[i]) for i, level in enumerate(self._levels)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them, where the network can."""
        able = [module for module in self.network.modules() if hasattr(module, "grad_checkpointing")]
        for module in able:
            # Stages and what holds them may both offer it; twice would compute everything twice.
            outer = any(inner in able for inner in module.modules() if inner is not module)
            module.grad_checkpointing = enable and not outer


def _channels_first(feature: Tensor, channels: int) -> Tensor:
    """Some of timm's networks give (N, H, W, C)."""
    if feature.shape[1] != channels and feature.shape[-1] == channels:
        return feature.permute(0, 3, 1, 2)
    return feature
