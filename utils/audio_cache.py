"""Embeddings of a frozen VGGish, computed once for each sound."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from utils.files import atomic_path


class AudioEmbeddings:
    """Looks a clip's embedding up by its log-mel, in memory, then on disk; computes it where neither has it.

    An embedding is always computed from its clip alone and in float32, so it does not depend on the batch that it was
    first met in: a run that goes on reads what an uninterrupted one would have computed, bit for bit.

    Args:
        vggish: frozen; (N, 1, 96, 64) -> (N, D).
        folder: of the cache; embeddings of other weights lie in other folders below it.
    """

    def __init__(self, vggish: nn.Module, folder: Path) -> None:
        self.vggish = vggish
        self.folder = folder / weights_hash(vggish)
        self._memory: dict[str, Tensor] = {}

    def __call__(self, log_mel: Tensor) -> Tensor:
        """Log-mels of clips (B, T, 1, 96, 64) -> embeddings (B * T, D) float32, on the same device."""
        return torch.cat([self._clip(clip) for clip in log_mel]).to(log_mel.device)

    def _clip(self, log_mel: Tensor) -> Tensor:
        key = hashlib.sha256(log_mel.float().contiguous().cpu().numpy().tobytes()).hexdigest()
        if key not in self._memory:
            path = self.folder / key[:2] / f"{key}.f32"
            found = _read(path, len(log_mel))
            if found is None:
                with torch.no_grad(), torch.autocast(log_mel.device.type, enabled=False):
                    found = self.vggish(log_mel.float()).cpu()
                with atomic_path(path) as part:
                    part.write_bytes(found.numpy().tobytes())
            self._memory[key] = found
        return self._memory[key]


def weights_hash(module: nn.Module) -> str:
    """A name for a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path, frames: int) -> Tensor | None:
    """(T, D), or None where the file is missing or of a wrong size."""
    try:
        values = np.frombuffer(path.read_bytes(), dtype=np.float32)
    except (OSError, ValueError):
        return None
    if values.size == 0 or values.size % frames:
        return None
    return torch.from_numpy(values.reshape(frames, -1).copy())
