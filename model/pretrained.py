"""Pretrained weights of the backbones, read into a model after it is built."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from model.aisfx import AiSFX
from model.avs_model import AVSModel
from model.checkpoint import backbone_to_ours, check_weights, read_file, read_state_dict
from utils.errors import CheckpointError, ConfigError


def load_pretrained(model: AVSModel, cfg: Mapping[str, Any]) -> None:
    """Load the pretrained weights that a config names; other weights keep their initialisation.

    Args:
        model: `build_model(cfg)`.
        cfg: `config.model`, of which these keys are read:
            `backbone.weights`: file (AVSBench's `pvt_v2_b5.pth`, `resnet50-19c8e357.pth`, EfficientNet-Lite's, or one of
            timm's), 'timm' for the weights that timm downloads, or None.
            `audio_encoder.weights`: file (AVSBench's `vggish-10086976.pth`, or aiSFX's for `AiSFX`), or None.
            `audio_encoder.pca_weights`: file of VGGish's PCA, needed with `audio_encoder.pca=True`.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the model.
        ConfigError: `weights='timm'` for a backbone that is not one of timm's.
    """
    weights = (cfg.get("backbone") or {}).get("weights")
    if weights == "timm":
        load_timm_weights(model.backbone)
    elif weights is not None:
        load_backbone(model.backbone, weights)
    audio_cfg = cfg.get("audio_encoder") or {}
    if audio_cfg.get("weights") is not None:
        load = load_aisfx if isinstance(model.audio_encoder, AiSFX) else load_vggish
        load(model.audio_encoder, audio_cfg["weights"])
    if audio_cfg.get("pca"):
        load_pca(model.audio_encoder.get_submodule("pca"), audio_cfg.get("pca_weights"))


def load_timm_weights(backbone: nn.Module) -> None:
    """Download timm's weights into a `TimmBackbone`.

    Raises:
        ConfigError: another class, or a network without pretrained weights.
        CheckpointError: the download failed.
    """
    name = getattr(backbone, "name", None)
    if not isinstance(name, str) or not timm.is_model_pretrained(name):
        name = name or type(backbone).__name__
        raise ConfigError(f"model.backbone.weights='timm', but timm has no weights for {name!r}.")
    try:
        pretrained = timm.create_model(name, pretrained=True, features_only=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"model.backbone.weights='timm': {name!r} was not loaded: {error}") from error
    backbone.get_submodule("network").load_state_dict(pretrained.state_dict())


def load_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Load image weights, AVSBench's files or timm's, into a `TimmBackbone`.

    Tensors of timm's full network that give no feature maps, such as classifiers, are left out.

    Raises:
        CheckpointError: see model.checkpoint.load_weights.
    """
    weights = read_state_dict(path)
    network = backbone.get_submodule("network")
    full = _full_network(str(getattr(backbone, "name", "")))
    if "_conv_stem.weight" in weights and len(weights) == len(full):
        # EfficientNet-Lite's file has the tensors of timm's network in the same order, under other names.
        weights = dict(zip(full, weights.values(), strict=True))
    weights = backbone_to_ours(weights)
    expected = network.state_dict()
    left_out = set(backbone_to_ours(full)) - set(expected)
    weights = {name: tensor for name, tensor in weights.items() if name not in left_out}
    # ResNet's file is older than PyTorch 0.4.1, which introduced num_batches_tracked.
    counters = {name: tensor for name, tensor in expected.items() if name.endswith(".num_batches_tracked")}
    _load(network, counters | weights, path)


def load_aisfx(encoder: nn.Module, path: str | Path) -> None:
    """Load aiSFX's weights, `checkpoint.pth` of its package: a tuple of weights and the training's settings.

    Raises:
        CheckpointError: see model.checkpoint.load_weights.
    """
    content = read_file(path)
    if isinstance(content, tuple) and content:
        content = content[0]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds no weights of aiSFX.")
    prefix = "embedding_net."
    weights = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
    _load(encoder, weights or dict(content), path)


def load_vggish(vggish: nn.Module, path: str | Path) -> None:
    """Load VGGish weights; PCA parameters stay as they are.

    Raises:
        CheckpointError: see model.checkpoint.load_weights.
    """
    pca = {name: tensor for name, tensor in vggish.state_dict().items() if name.startswith("pca.")}
    _load(vggish, read_state_dict(path) | pca, path)


def load_pca(pca: nn.Module, path: str | Path | None) -> None:
    """Load VGGish's PCA parameters: `pca_eigen_vectors` (128, 128) and `pca_means` (128, 1).

    Raises:
        CheckpointError: see model.checkpoint.load_weights; also if `path` is None.
    """
    if path is None:
        raise CheckpointError("model.audio_encoder.pca=True needs model.audio_encoder.pca_weights, the PCA's file.")
    content = read_file(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds no PCA parameters.")
    weights = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in content.items()}
    weights = {name: value.reshape(-1, 1) if name == "pca_means" else value for name, value in weights.items()}
    _load(pca, weights, path)


def _full_network(name: str) -> dict[str, Tensor]:
    """Tensors of timm's network with its classifier, by name, without memory; empty for another backbone."""
    if not timm.is_model(name):
        return {}
    with torch.device("meta"):
        state: dict[str, Tensor] = timm.create_model(name).state_dict()
    return state


def _load(module: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    check_weights(weights, module.state_dict(), str(path))
    module.load_state_dict(weights)
