"""Image backbones from timm: feature maps at 1/4, 1/8, 1/16 and 1/32 of the frame's size, or of a single scale."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from utils.errors import ConfigError
from utils.registry import MODELS, suggestion

STRIDES = (4, 8, 16, 32)
PUBLISHED_NAMES = {"res50": "resnet50"}
"""Names in AVSegFormer's configs -> names in timm."""


@MODELS.register_module()
class TimmBackbone(nn.Module):
    """Any timm network with feature maps at strides 4, 8, 16 and 32, or of one scale (ViT), randomly initialised.

    Frames arrive with ImageNet's mean and standard deviation. A network that was pretrained with others, by its
    `pretrained_cfg` in timm, receives them with its own. Networks of a fixed input size are told to accept any, where
    they can (ViT, DINOv2, EVA-02, Swin); to a network of one scale, frames are resized up to whole patches.

    Args:
        name: timm's name, or `res50`.
        drop_path_rate: stochastic depth rate in training; None for timm's default.
        img_size: frame size in pixels, or (height, width), that a network of a fixed input size is built for (BEiT,
            MaxViT, Hiera); None for timm's default.

    Attributes:
        name: timm's name.
        channels: channels of the four maps, or of the only one.
        stride: pixels of the frame per pixel of the only map; None for four maps.
        options: what timm's `create_model` received besides the name.

    Raises:
        ConfigError: timm does not know the name, or the network lacks one of the strides or an option.
    """

    network: Any
    frame_scale: Tensor | None
    frame_shift: Tensor | None

    def __init__(
        self, name: str, drop_path_rate: float | None = None, img_size: int | Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.name = PUBLISHED_NAMES.get(name, name)
        if not timm.is_model(self.name):
            known = [*PUBLISHED_NAMES, *timm.list_models(f"{self.name[:5]}*")]
            raise ConfigError(f"model.backbone.type={name!r} is not a network of timm: {suggestion(name, known)}")
        self.options: dict[str, Any] = {} if drop_path_rate is None else {"drop_path_rate": drop_path_rate}
        if img_size is not None:
            self.options["img_size"] = _checked_size(img_size)
        self.network = self._create(name)
        self.stride, self._levels, self.channels = self._choose_maps(name)
        self._channels_last = str(getattr(self.network, "output_fmt", "NCHW")) in ("NHWC", "Format.NHWC")
        scale, shift = _conversion(self.network.pretrained_cfg)
        self.register_buffer("frame_scale", scale, persistent=False)
        self.register_buffer("frame_shift", shift, persistent=False)

    def _create(self, name: str) -> nn.Module:
        """The network; `options` gains what makes it accept frames of any size."""
        cfg = timm.get_pretrained_cfg(self.name)
        if cfg is not None and cfg.fixed_input_size:
            with contextlib.suppress(TypeError, RuntimeError, AssertionError, AttributeError):
                flexible = {**self.options, "dynamic_img_size": True}
                network: nn.Module = timm.create_model(self.name, features_only=True, **flexible)
                self.options = flexible
                return network
        try:
            return timm.create_model(self.name, features_only=True, **self.options)
        except (RuntimeError, TypeError, AssertionError, AttributeError, ValueError) as error:
            if "img_size" in self.options and "img_size" in str(error):
                raise ConfigError(
                    f"model.backbone.img_size={self.options['img_size']}: {name!r} has no such option; leave it out."
                ) from error
            raise ConfigError(f"model.backbone.type={name!r} has no feature maps: {error}") from error

    def _choose_maps(self, name: str) -> tuple[int | None, list[int], tuple[int, ...]]:
        """Stride of the only map, or None; indices and channels of the maps to use."""
        info = self.network.feature_info
        last = {level["reduction"]: (index, level["num_chs"]) for index, level in enumerate(info)}
        if len(last) == 1:
            ((stride, (_, channels)),) = last.items()
            return stride, [-1], (channels,)
        if not set(STRIDES) <= set(last):
            raise ConfigError(
                f"model.backbone.type={name!r} has feature maps at strides {sorted(last)}; {STRIDES}, or maps of a "
                "single scale (ViT), are needed."
            )
        levels = [last[stride][0] for stride in STRIDES]
        if not set(levels) <= set(info.out_indices):  # timm leaves some out by default
            self.options["out_indices"] = levels
            self.network = timm.create_model(self.name, features_only=True, **self.options)
        returned = sorted(self.network.feature_info.out_indices)
        return None, [returned.index(level) for level in levels], tuple(last[stride][1] for stride in STRIDES)

    def forward(self, frames: Tensor) -> list[Tensor]:
        """ImageNet-normalised frames (N, 3, H, W) -> four maps (N, channels[l], H / stride, W / stride), or one.

        Raises:
            ConfigError: frames of a size that the network does not accept.
        """
        height, width = frames.shape[-2:]
        if height % STRIDES[0] or width % STRIDES[0]:
            raise ConfigError(
                f"frames of {height} x {width}: masks are predicted at a quarter of their size, so set "
                f"dataset.*.img_size to multiples of {STRIDES[0]}."
            )
        if self.frame_scale is not None and self.frame_shift is not None:
            frames = frames * self.frame_scale + self.frame_shift
        maps = self._maps(frames if self.stride is None else _to_whole_patches(frames, self.stride))
        chosen = [maps[level] for level in self._levels]
        if self._channels_last:
            chosen = [feature.permute(0, 3, 1, 2) for feature in chosen]
        if self.stride is None:
            self._check_finest(chosen[0], frames)
        return chosen

    def _maps(self, frames: Tensor) -> list[Tensor]:
        if torch.compiler.is_compiling():
            return list(self.network(frames))
        try:
            return list(self.network(frames))
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:
            message = self._size_fault(*frames.shape[-2:])
            if message is None:
                raise
            raise ConfigError(f"{message} ({str(error).splitlines()[0] if str(error) else 'timm refuses'}).") from error

    def _size_fault(self, height: int, width: int) -> str | None:
        """What is wrong with a frame size that made the network fail; None where the size is not the reason."""
        cfg = self.network.pretrained_cfg
        built = self.options.get("img_size", tuple(cfg["input_size"][-2:]) if cfg.get("fixed_input_size") else None)
        if built is not None and "dynamic_img_size" not in self.options and tuple(built) != (height, width):
            return (
                f"backbone {self.name} was built for {built[0]} x {built[1]} frames and got {height} x {width}: set "
                f"model.backbone.img_size=({height},{width}), or dataset.*.img_size=({built[0]},{built[1]})"
            )
        if height % STRIDES[-1] or width % STRIDES[-1]:
            return (
                f"backbone {self.name} cannot read frames of {height} x {width}: set dataset.*.img_size to multiples "
                f"of {STRIDES[-1]}"
            )
        return None

    def _check_finest(self, finest: Tensor, frames: Tensor) -> None:
        height, width = frames.shape[-2:]
        if tuple(finest.shape[-2:]) != (math.ceil(height / STRIDES[0]), math.ceil(width / STRIDES[0])):
            raise ConfigError(
                f"backbone {self.name} has a finest map of {finest.shape[2]} x {finest.shape[3]} pixels for frames of "
                f"{height} x {width}, which is not a quarter: choose another network, or dataset.*.img_size in "
                f"multiples of {STRIDES[-1]}."
            )

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


def _to_whole_patches(frames: Tensor, patch: int) -> Tensor:
    """Frames (N, 3, H, W), resized bilinearly to the next multiples of the patch size."""
    size = [math.ceil(side / patch) * patch for side in frames.shape[-2:]]
    return frames if list(frames.shape[-2:]) == size else F.interpolate(frames, size=size, mode="bilinear")


def _checked_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ConfigError(f"model.backbone.img_size={img_size!r}: give a number of pixels, or (height, width).")
    return sides
