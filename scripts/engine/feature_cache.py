"""Outputs of frozen networks, computed once per clip and kept on disk."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.avs_model import AVSModel
from model.checkpoint import weights_hash
from utils.files import atomic_path


class FrozenFeatures:
    """A frozen network's outputs for a clip, read from disk by the clip's content, and computed where they are missing.

    They are computed per clip, in float32 and in evaluation mode, so that they do not depend on the batch in which the
    clip first appeared: a resumed run reads, bit for bit, what an uninterrupted one would have computed.

    Clips are found by their bytes on the host: where they lie there, nothing waits for the device.

    Args:
        network: (T, ...) -> (T, ...), or a list of such; it runs where its weights are.
        folder: of the cache; each set of weights has its own folder below it. None keeps nothing on disk.
        in_memory: also keep in memory what was read, for small features.
        per_frame: compute and keep the features of each frame by itself, so that clips and single frames share them.
    """

    def __init__(self, network: nn.Module, folder: Path | None, *, in_memory: bool, per_frame: bool = False) -> None:
        self.network = network
        self.folder = None if folder is None else folder / weights_hash(network)
        self.in_memory = in_memory
        self.per_frame = per_frame
        self._memory: dict[str, list[Tensor]] = {}

    def __call__(self, clips: Tensor, changed: Tensor | None = None) -> list[Tensor]:
        """The network's outputs for clips.

        Args:
            clips: (B, T, ...), on the CPU.
            changed: (B,) bool, with `per_frame` (B, T): True for augmented inputs, which do not come again: their
                features are computed and not kept. None = none are.

        Returns:
            (B * T, ...) float32 each, on the CPU; pinned where there is a GPU.
        """
        parts = clips.flatten(0, 1).unsqueeze(1) if self.per_frame else clips
        passing = [False] * len(parts) if changed is None else changed.flatten().tolist()
        found = [
            self._compute(part) if once else self._features(part) for part, once in zip(parts, passing, strict=True)
        ]
        joined = [torch.cat(maps) for maps in zip(*found, strict=True)]
        return [maps.pin_memory() for maps in joined] if torch.cuda.is_available() else joined

    def _features(self, clip: Tensor) -> list[Tensor]:
        key = hashlib.sha256(clip.float().contiguous().cpu().numpy().data).hexdigest()
        if key in self._memory:
            return self._memory[key]
        if self.folder is None:
            return self._compute(clip)
        path = self.folder / key[:2] / f"{key}.safetensors"
        found = _read(path, len(clip))
        if found is None:
            found = self._compute(clip)
            # A full disk costs time and does not end the run.
            with suppress(OSError, SafetensorError), atomic_path(path, durable=False) as part:
                save_file({str(index): feature for index, feature in enumerate(found)}, part)
        if self.in_memory:
            self._memory[key] = found
        return found

    def _compute(self, clip: Tensor) -> list[Tensor]:
        device = next(self.network.parameters(), clip).device
        modes = [(module, module.training) for module in self.network.modules()]
        self.network.eval()
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                out = self.network(clip.float().to(device))
        finally:
            for module, training in modes:  # frozen normalisation stays in evaluation mode within a training network
                module.training = training
        return [feature.cpu().contiguous() for feature in (out if isinstance(out, Sequence) else [out])]


class KnownFeatures:
    """Inputs of the model that replace its frozen parts.

    Args:
        embeddings: outputs of the audio encoder, None where it is trained or not cached.
        maps: outputs of the backbone, likewise.
    """

    def __init__(self, embeddings: FrozenFeatures | None = None, maps: FrozenFeatures | None = None) -> None:
        self.embeddings = embeddings
        self.maps = maps

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the model's forward, on the CPU, for a batch of the data module that is there too."""
        known: dict[str, Any] = {}
        if self.embeddings is not None:
            known["embedding"] = self.embeddings(batch["log_mel"], batch.get("changed_sound"))[0]
        if self.maps is not None:
            known["features"] = self.maps(batch["frames"], batch.get("changed_frames"))
        return known


def known_features(process: Any, model: AVSModel, *, frozen_backbone: bool) -> KnownFeatures:
    """What `process.cache_features` and `process.cache_backbone` keep of a model's frozen parts, below the work_dir.

    Args:
        process: of the config.
        model: with its weights loaded.
        frozen_backbone: whether the backbone is frozen now.
    """
    folder, embeddings, maps = Path(process.work_dir), None, None
    if process.cache_features and model.audio_encoder.frozen:
        embeddings = FrozenFeatures(model.audio_encoder, folder / ".audio_cache", in_memory=True, per_frame=True)
    if process.cache_backbone and frozen_backbone:
        maps = FrozenFeatures(model.backbone, folder / ".backbone_cache", in_memory=False)
    return KnownFeatures(embeddings, maps)


def _read(path: Path, frames: int) -> list[Tensor] | None:
    """The features of a clip; None where the file is missing, torn or of another clip length."""
    try:
        named = load_file(path)
        found = [named[str(index)] for index in range(len(named))]
    except (OSError, SafetensorError, KeyError):
        return None
    return found if found and all(len(feature) == frames for feature in found) else None
