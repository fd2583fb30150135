"""Packed models: weights without the frozen pretrained parts, in a file that carries its config and scores.

A packed file is `.safetensors` with the tensors that training changed, and metadata: `format`, `task`, and as JSON
`config` (the whole config, see `published_config`), `left_out` (the parts that are not inside, each with a hash of its
tensors), `scores`, and where they were given `classes` (names by class index) and `record` (origin of the weights, see
scripts/engine/provenance.py, without the config). The parts left out are read from their pretrained weights, which
are fetched where they are missing.
`model/packed/` holds the models that come with the project.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from model.avs_model import AVSModel
from model.checkpoint import RECORD, load_weights, read_file, weights_hash
from model.pretrained import fetch_missing, load_pretrained
from utils.errors import CheckpointError, ConfigError
from utils.files import atomic_path
from utils.portable import portable

FORMAT = "modat-packed-1"


def pack(
    model: AVSModel,
    cfg: Any,
    target: Path,
    scores: Mapping[str, Any],
    *,
    classes: Sequence[str] | None = None,
    whole: bool = False,
    record: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write a packed model.

    Args:
        model: `build_model(cfg.model)` with its weights.
        cfg: its config, from utils.config.load_config.
        target: a `.safetensors` file.
        scores: anything that JSON holds, for readers of the file.
        classes: names by class index, background first, one per class of the config; None leaves them out.
        whole: leave nothing out.
        record: of the weights' origin, from `model.checkpoint.read_record`.

    Returns:
        The parts left out: 'backbone', 'audio_encoder'.

    Raises:
        ConfigError: the target has another suffix, the config freezes no pretrained part throughout and `whole` is
            False, or the number of names is another than that of the classes.
    """
    if target.suffix != ".safetensors":
        raise ConfigError(f"{target}: a packed model is a .safetensors file.")
    _check_class_names(classes, cfg)
    frozen = [] if whole else frozen_parts(model, cfg)
    if not frozen and not whole:
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
        "config": json.dumps(published_config(cfg, frozen)),
        "left_out": json.dumps({part: weights_hash(model.get_submodule(part)) for part in frozen}),
        "scores": json.dumps(scores),
    }
    if classes is not None:
        metadata["classes"] = json.dumps(list(classes))
    if record is not None:
        metadata[RECORD] = json.dumps({key: value for key, value in record.items() if key != "config"})
    with atomic_path(target) as part:
        safetensors.torch.save_file(weights, part, metadata=metadata)
    return frozen


def published_config(cfg: Any, left_out: Sequence[str]) -> dict[str, Any]:
    """The whole config as plain values, without absolute paths but those of the weights of parts left out.

    Args:
        cfg: from utils.config.load_config.
        left_out: 'backbone', 'audio_encoder': they are read from the files that the config names.
    """
    config: dict[str, Any] = json.loads(json.dumps(cfg.to_dict(), default=str))
    found: dict[str, Any] = portable(config)
    found["model"] |= {part: config["model"][part] for part in left_out}
    return found


def frozen_parts(model: AVSModel, cfg: Any) -> list[str]:
    """The parts that have pretrained weights and stay frozen throughout training: 'backbone', 'audio_encoder'."""
    frozen = []
    if cfg.model["backbone"].get("weights") and cfg.process.freeze_epochs >= cfg.process.train_epochs:
        frozen.append("backbone")
    if cfg.model["audio_encoder"].get("weights") and getattr(model.audio_encoder, "frozen", False):
        frozen.append("audio_encoder")
    return frozen


def metadata(path: Path) -> dict[str, Any] | None:
    """Metadata of a packed model, decoded; None for any other file.

    Raises:
        CheckpointError: it is damaged.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return None  # load_weights says what is wrong with it
    if found.get("format") != FORMAT:
        return None
    keys = ("config", "left_out", "scores", *(["classes"] if "classes" in found else []))
    try:
        return {**found, **{key: json.loads(found[key]) for key in keys}}
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: its metadata lacks or garbles {error}.") from error


def packed_classes(path: Path) -> list[str] | None:
    """Class names that a packed model carries, by class index; None where it carries none."""
    names = (metadata(path) or {}).get("classes")
    return None if names is None else [str(name) for name in names]


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
    if not packed["left_out"]:
        load_weights(model, read_file(path))
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


def _check_class_names(classes: Sequence[str] | None, cfg: Any) -> None:
    expected = max(2, cfg.model["head"].get("num_classes", 1))  # binary masks tell an object from the background
    if classes is not None and len(classes) != expected:
        raise ConfigError(
            f"classes has {len(classes)} names, but the masks have {expected} classes: name each of them."
        )
