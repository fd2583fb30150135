"""Packed models: weights without the frozen pretrained parts, in a file that carries its config and scores.

A packed file is `.safetensors` with the tensors that training changed, and metadata: `format`, `task`, and as JSON
`config` (the whole config), `left_out` (the parts that are not inside, each with a hash of its tensors) and `scores`.
The parts left out are read from their pretrained weights, which are fetched where they are missing.
`model/packed/` holds the models that come with the project.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from model.avs_model import AVSModel
from model.checkpoint import load_weights, read_file, weights_hash
from model.pretrained import fetch_missing, load_pretrained
from utils.errors import CheckpointError, ConfigError
from utils.files import atomic_path

FORMAT = "modat-packed-1"


def pack(model: AVSModel, cfg: Any, target: Path, scores: Mapping[str, Any]) -> list[str]:
    """Write a packed model.

    Args:
        model: `build_model(cfg.model)` with its weights.
        cfg: its config, from utils.config.load_config.
        target: a `.safetensors` file.
        scores: anything that JSON holds, for readers of the file.

    Returns:
        The parts left out: 'backbone', 'audio_encoder'.

    Raises:
        ConfigError: the target has another suffix, or the config freezes no pretrained part throughout.
    """
    if target.suffix != ".safetensors":
        raise ConfigError(f"{target}: a packed model is a .safetensors file.")
    frozen = []
    if cfg.model["backbone"].get("weights") and cfg.process.freeze_epochs >= cfg.process.train_epochs:
        frozen.append("backbone")
    if cfg.model["audio_encoder"].get("weights") and getattr(model.audio_encoder, "frozen", False):
        frozen.append("audio_encoder")
    if not frozen:
        raise ConfigError(
            "nothing to leave out: neither backbone nor audio encoder has pretrained weights and stays frozen in this "
            "config; convert the checkpoint with scripts/convert_checkpoint.py instead."
        )
    prefixes = tuple(f"{part}." for part in frozen)
    weights = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
        if not name.startswith(prefixes)
    }
    metadata = {
        "format": FORMAT,
        "task": str(cfg.task),
        "config": json.dumps(cfg.to_dict(), default=str),
        "left_out": json.dumps({part: weights_hash(model.get_submodule(part)) for part in frozen}),
        "scores": json.dumps(scores),
    }
    with atomic_path(target) as part:
        safetensors.torch.save_file(weights, part, metadata=metadata)
    return frozen


def metadata(path: Path) -> dict[str, Any] | None:
    """Metadata of a packed model, decoded; None for any other file."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return None  # load_weights says what is wrong with it
    if found.get("format") != FORMAT:
        return None
    try:
        return {**found, **{key: json.loads(found[key]) for key in ("config", "left_out", "scores")}}
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: its metadata lacks or garbles {error}.") from error


def load_checkpoint(model: AVSModel, model_cfg: Mapping[str, Any], path: Path) -> None:
    """Load whole weights, published or ours, or a packed model with the pretrained parts that it leaves out.

    Args:
        model: `build_model(model_cfg)`.
        model_cfg: `config.model`.
        path: the file.

    Raises:
        CheckpointError: it does not fit the model, or the pretrained parts are not those it was trained on.
        DownloadError: pretrained weights are missing and cannot be fetched.
    """
    packed = metadata(path)
    if packed is None:
        load_weights(model, path)
        return
    fetch_missing(model_cfg)
    load_pretrained(model, model_cfg)
    for part, expected in packed["left_out"].items():
        if weights_hash(_part(model, part, path)) != expected:
            raise CheckpointError(
                f"{path} was trained on another {part} than this config's: take the config that it carries "
                f"(model.{part}={packed['config'].get('model', {}).get(part)!r})."
            )
    prefixes = tuple(f"{part}." for part in packed["left_out"])
    pretrained = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
    load_weights(model, {**pretrained, **read_file(path)})


def _part(model: AVSModel, name: str, path: Path) -> nn.Module:
    if name not in ("backbone", "audio_encoder"):
        raise CheckpointError(f"{path} is damaged: it leaves out {name!r}, which is no part of a model.")
    return model.get_submodule(name)
