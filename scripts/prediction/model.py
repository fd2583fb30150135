"""A model with what prediction needs beside it: front end, size of its frames, class names."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mmengine.config import ConfigDict
from torch import Tensor

from dataloader.audio import FrontEnd
from dataloader.front_ends import front_end
from dataloader.images import Placement, normalise
from scripts.engine.testing import ModelPredictor, Predictor
from utils.errors import ConfigError
from utils.runtime import ROOT, find_file, warn

PACKED = Path("model") / "packed"
Planes = npt.NDArray[np.uint8]
"""Masks of n frames: (n, 1, H, W), probability * 255; or for classes (n, 2, H, W), probability * 255 and class."""


class PredictionModel:
    """Frames and log-mels in, masks out.

    Args:
        predictor: of logits, one clip at a time.
        front_end: of the audio encoder.
        size: (height, width) of the model's frames, pixels.
        num_frames: T, frames per clip.
        classes: names by class index, background first; two names for one kind of object.
        description: what result.json says of the model; two models that differ have different descriptions.
        precision: in which it computes.
    """

    def __init__(
        self,
        predictor: Predictor,
        front_end: FrontEnd,
        *,
        size: tuple[int, int],
        num_frames: int,
        classes: Sequence[str],
        description: dict[str, str],
        precision: str = "32",
    ) -> None:
        self.predictor = predictor
        self.front_end = front_end
        self.size = size
        self.placement = Placement(*size)
        self.num_frames = num_frames
        self.classes = list(classes)
        self.description = description
        self.precision = precision

    @property
    def semantic(self) -> bool:
        """Whether masks have classes."""
        return len(self.classes) > 2

    def masks(self, frames: npt.NDArray[np.uint8], log_mel: Tensor) -> Planes:
        """Masks of at most T frames, as one clip; what is missing to T is padding.

        Args:
            frames: (n, H, W, 3) uint8 of `size`.
            log_mel: (n, *front_end.shape) float32.

        Returns:
            (n, 1, H, W) uint8: probability of a sounding object times 255. For classes (n, 2, H, W): p / (p + q) times
            255, with p the probability of the likeliest object class and q that of the background, above 127 where an
            object is likelier than the background; and that class.
        """
        count, total = len(frames), self.num_frames
        batch: dict[str, Any] = {
            "frames": torch.zeros(1, total, 3, *self.size),
            "log_mel": torch.zeros(1, total, *self.front_end.shape),
            "vid_temporal_mask_flag": (torch.arange(total) < count).float()[None],
            "name": [""],
        }
        batch["gt_temporal_mask_flag"] = batch["vid_temporal_mask_flag"]
        batch["frames"][0, :count] = normalise(frames)
        batch["log_mel"][0, :count] = log_mel
        logits = self.predictor.logits(batch, 0)[:count].float()  # (n, K, H, W)
        if logits.shape[1] == 1:
            return _bytes(logits.sigmoid())
        best, classes = logits[:, 1:].max(dim=1, keepdim=True)
        probability = _bytes((best - logits[:, :1]).sigmoid())
        return np.concatenate([probability, (classes + 1).to(torch.uint8).numpy()], axis=1)


def load_for_prediction(
    checkpoint: str | Path | None = None,
    config: str | Path | None = None,
    *,
    precision: str = "auto",
    overrides: Sequence[str] = (),
) -> PredictionModel:
    """Load a model for `predict`.

    Args:
        checkpoint: a packed model by file or by its name in model/packed/; a model folder or a repository of the hub
            (see model/hub.py); or, with `config`, any weights of the project. None: the only model in model/packed/,
            or the first by name.
        config: a config file; None takes the one inside a packed model.
        precision: '32', 'bf16', '16', or 'auto': the fastest of the first two on this device.
        overrides: `key=value` of the config file.

    Raises:
        ConfigError: no such file, weights without a config, or there is no packed model.
        CheckpointError: the weights do not fit.
        DownloadError: pretrained parts are missing and cannot be fetched.
    """
    from model import build_model
    from model.hub import find_weights
    from model.packed import load_checkpoint, packed_classes
    from model.precision import check_precision
    from utils.cpu import resolve_precision
    from utils.reproducibility import configure_torch, seed_everything

    weights = default_checkpoint() if checkpoint is None else find_weights(checkpoint)
    cfg = _config(weights, config, overrides)
    process = cfg["process"]
    configure_torch(process)
    seed_everything(process["seed"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = resolve_precision(precision, device, warn)
    check_precision(resolved, device.type)
    with _inside(ROOT):  # names of pretrained weights are relative to it
        network = build_model(cfg["model"])
        load_checkpoint(network, cfg["model"], weights)
        classes = packed_classes(weights) or class_names(cfg)
    return PredictionModel(
        ModelPredictor(network, resolved, device),
        front_end(str(getattr(network.audio_encoder, "front_end", "vggish"))),
        size=frame_size(cfg),
        num_frames=network.num_frames,
        classes=classes,
        description={
            "checkpoint": weights.name,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "config": hashlib.sha256(json.dumps(_plain(cfg), sort_keys=True, default=str).encode()).hexdigest(),
            "task": str(cfg["task"]),
            "precision": precision,
        },
        precision=resolved,
    )


def default_checkpoint() -> Path:
    """The first model in model/packed/, by name.

    Raises:
        ConfigError: there is none.
    """
    found = sorted((ROOT / PACKED).glob("*.safetensors"))
    if not found:
        raise ConfigError(
            f"no model is named and {PACKED} holds none: give --checkpoint WEIGHTS with --config CONFIG, or "
            "--checkpoint PACKED (scripts/pack_weights.py makes one)."
        )
    return found[0]


def frame_size(cfg: Any) -> tuple[int, int]:
    """(height, width) of the frames of a config's test split, pixels."""
    split = cfg["dataset"]["test"]
    if cfg["task"] == "avss" and split.get("crop_img_and_mask", True):
        side = int(split.get("crop_size", 224))
        return side, side
    height, width = split.get("img_size", (224, 224))
    return int(height), int(width)


def class_names(cfg: Any) -> list[str]:
    """Names by class index; where the table of AVSS is missing, the classes have numbers."""
    from dataloader.semantic import read_classes

    count = int(cfg["model"].get("head", {}).get("num_classes", 1))
    if count == 1:
        return ["background", "sounding object"]
    table = cfg["dataset"]["test"].get("label_idx_path")
    if table and Path(table).is_file():
        return list(read_classes(table, count))
    return ["background", *(f"class {index}" for index in range(1, count))]


def _config(weights: Path, config: str | Path | None, overrides: Sequence[str]) -> Any:
    from model.packed import metadata
    from utils.config import check_classes, load_config

    if config is not None:
        path = find_file(str(config), "the config")
        with _inside(ROOT):
            cfg = load_config(path, overrides)
        check_classes(cfg)
        return cfg
    packed = metadata(weights)
    if packed is None:
        raise ConfigError(f"{weights} carries no config: name it with --config CONFIG.")
    if overrides:
        raise ConfigError(f"{overrides[0]}: overrides change a config file; name it with --config CONFIG.")
    return ConfigDict({**packed["config"], "task": packed["task"]})


def _plain(cfg: Any) -> Any:
    return {key: cfg[key] for key in ("task", "model")}


def _bytes(probability: Tensor) -> Planes:
    return probability.mul(255).round().to(torch.uint8).cpu().numpy()


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
