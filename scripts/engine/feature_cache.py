"""What frozen networks say of each clip, computed once."""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils.files import atomic_path


class FrozenFeatures:
    """Looks a frozen network's outputs for a clip up on disk, by the clip's content; computes them where they are not.

    They are always computed from the clip alone, in float32 and in evaluation mode, so they do not depend on the batch
    that the clip was first met in: a run that goes on reads what an uninterrupted one would have computed, bit for bit.

    Args:
        network: (T, ...) -> (T, ...), or a list of such.
        folder: of the cache; features of other weights lie in other folders below it.
        in_memory: keep what was read, for small features.
    """

    def __init__(self, network: nn.Module, folder: Path, *, in_memory: bool) -> None:
        self.network = network
        self.folder = folder / weights_hash(network)
        self.in_memory = in_memory
        self._memory: dict[str, list[Tensor]] = {}

    def __call__(self, clips: Tensor) -> list[Tensor]:
        """Inputs of clips (B, T, ...) -> each output of the network, (B * T, ...) float32, on the same device."""
        found = [self._features(clip) for clip in clips]
        return [torch.cat(maps).to(clips.device) for maps in zip(*found, strict=True)]

    def _features(self, clip: Tensor) -> list[Tensor]:
        key = hashlib.sha256(clip.float().contiguous().cpu().numpy().data).hexdigest()
        if key in self._memory:
            return self._memory[key]
        path = self.folder / key[:2] / f"{key}.safetensors"
        found = _read(path, len(clip))
        if found is None:
            found = self._compute(clip)
            # A full disk costs time, not the run.
            with suppress(OSError, SafetensorError), atomic_path(path, durable=False) as part:
                save_file({str(index): feature for index, feature in enumerate(found)}, part)
        if self.in_memory:
            self._memory[key] = found
        return found

    def _compute(self, clip: Tensor) -> list[Tensor]:
        training = self.network.training
        self.network.eval()
        try:
            with torch.no_grad(), torch.autocast(clip.device.type, enabled=False):
                out = self.network(clip.float())
        finally:
            self.network.train(training)
        return [feature.cpu().contiguous() for feature in (out if isinstance(out, Sequence) else [out])]


def weights_hash(module: nn.Module) -> str:
    """A name for a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path, frames: int) -> list[Tensor] | None:
    """The features of a clip; None where the file is missing, torn or of another clip length."""
    try:
        named = load_file(path)
        found = [named[str(index)] for index in range(len(named))]
    except (OSError, SafetensorError, KeyError):
        return None
    return found if found and all(len(feature) == frames for feature in found) else None
