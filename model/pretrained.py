"""Pretrained weights of the backbones, read into a model after it is built."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from model.avs_model import AVSModel
from model.checkpoint import backbone_to_ours, check_weights, read_file, read_state_dict
from utils.errors import CheckpointError, ConfigError


def load_pretrained(model: AVSModel, cfg: Mapping[str, Any]) -> None:
    """Load the pretrained weights that a config names; other weights keep their initialisation.

    Args:
        model: `build_model(cfg)`.
        cfg: `config.model`, of which these keys are read:
            `backbone.weights`: file (AVSBench's `pvt_v2_b5.pth`, `resnet50-19c8e357.pth`, or one of timm's), 'timm' for
            the weights that timm downloads, or None.
            `audio_encoder.weights`: file (AVSBench's `vggish-10086976.pth`), or None.
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
        load_vggish(model.audio_encoder, audio_cfg["weights"])
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
    """Load image weights, AVSBench's files or timm's, into a `TimmBackbone`; classifiers are left out.

    Raises:
        CheckpointError: see model.checkpoint.load_weights.
    """
    weights = {k: v for k, v in read_state_dict(path).items() if not k.startswith(("head.", "fc."))}
    network = backbone.get_submodule("network")
    # ResNet's file is older than PyTorch 0.4.1, which introduced num_batches_tracked.
    counters = {name: tensor for name, tensor in network.state_dict().items() if name.endswith(".num_batches_tracked")}
    _load(network, counters | backbone_to_ours(weights), path)


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


def _load(module: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    check_weights(weights, module.state_dict(), str(path))
    module.load_state_dict(weights)
