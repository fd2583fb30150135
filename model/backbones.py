"""Image backbones from timm: feature maps at 1/4, 1/8, 1/16 and 1/32 of the frame's size."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from utils.errors import ConfigError
from utils.registry import MODELS, suggestion

STRIDES = (4, 8, 16, 32)
PUBLISHED_NAMES = {"res50": "resnet50"}
"""Names in AVSegFormer's configs -> names in timm."""


@MODELS.register_module()
class TimmBackbone(nn.Module):
    """Any timm network with feature maps at strides 4, 8, 16 and 32, randomly initialised.

    Frames arrive with ImageNet's mean and standard deviation. A network that was pretrained with others, by its
    `pretrained_cfg` in timm, receives them with its own.

    Args:
        name: timm's name, or `res50`.
        drop_path_rate: stochastic depth rate in training; None for timm's default.

    Attributes:
        name: timm's name.
        channels: channels of the four maps.

    Raises:
        ConfigError: timm does not know the name, or the network lacks one of the strides.
    """

    frame_scale: Tensor | None
    frame_shift: Tensor | None

    def __init__(self, name: str, drop_path_rate: float | None = None) -> None:
        super().__init__()
        self.name = PUBLISHED_NAMES.get(name, name)
        if not timm.is_model(self.name):
            known = [*PUBLISHED_NAMES, *timm.list_models(f"{self.name[:5]}*")]
            raise ConfigError(f"model.backbone.type={name!r} is not a network of timm: {suggestion(name, known)}")
        options: dict[str, Any] = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
        try:
            network: Any = timm.create_model(self.name, features_only=True, **options)
        except (RuntimeError, TypeError, AssertionError, AttributeError) as error:
            raise ConfigError(f"model.backbone.type={name!r} has no feature maps: {error}") from error
        levels = {info["reduction"]: (index, info["num_chs"]) for index, info in enumerate(network.feature_info)}
        if not set(STRIDES) <= set(levels):
            raise ConfigError(
                f"model.backbone.type={name!r} has feature maps at strides {sorted(levels)}; {STRIDES} are needed."
            )
        self.network = network
        self._levels = [levels[stride][0] for stride in STRIDES]
        self.channels = tuple(levels[stride][1] for stride in STRIDES)
        scale, shift = _conversion(network.pretrained_cfg)
        self.register_buffer("frame_scale", scale, persistent=False)
        self.register_buffer("frame_shift", shift, persistent=False)

    def forward(self, frames: Tensor) -> list[Tensor]:
        """ImageNet-normalised frames (N, 3, H, W) -> four maps (N, channels[l], H / stride, W / stride)."""
        if self.frame_scale is not None and self.frame_shift is not None:
            frames = frames * self.frame_scale + self.frame_shift
        maps = self.network(frames)
        return [_channels_first(maps[level], self.channels[i]) for i, level in enumerate(self._levels)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them, where the network supports it."""
        supporting = [module for module in self.network.modules() if hasattr(module, "grad_checkpointing")]
        for module in supporting:
            # Stages and their parents may both support it; enabling both would recompute twice.
            outer = any(inner in supporting for inner in module.modules() if inner is not module)
            module.grad_checkpointing = enable and not outer


def _conversion(pretrained_cfg: Mapping[str, Any]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Scale and shift, (3, 1, 1) each, from ImageNet's normalisation to the network's; None where they are the same."""
    given = (
        tuple(pretrained_cfg.get("mean", IMAGENET_DEFAULT_MEAN)),
        tuple(pretrained_cfg.get("std", IMAGENET_DEFAULT_STD)),
    )
    mean, std, from_mean, from_std = (
        torch.tensor(x, dtype=torch.float64) for x in (*given, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    if given == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        return None, None
    return (from_std / std).float()[:, None, None], ((from_mean - mean) / std).float()[:, None, None]


def _channels_first(feature: Tensor, channels: int) -> Tensor:
    """Some of timm's networks output (N, H, W, C)."""
    if feature.shape[1] != channels and feature.shape[-1] == channels:
        return feature.permute(0, 3, 1, 2)
    return feature
