"""Audio ablations: a data set's sounds replaced by silence, noise, or the sounds of other clips."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataloader import AudioVisualDataset
from dataloader.audio import SAMPLE_RATE
from utils.errors import DataError
from utils.reproducibility import step_seed

NOISE_LEVEL = 0.1
"""Standard deviation of the noise, full scale 1; about that of loud speech."""


class ReplacedSound(Dataset[dict[str, Any]]):
    """A data set with the sound of every clip replaced.

    Args:
        dataset: of frames and masks; its front end computes the log-mels.
        sound: 'silence' (the log-mel of zeros), 'noise' (white noise, drawn per clip) or 'shuffled' (each clip gets the
            sound of another one; every sound is used once).
        seed: of noise and permutation.

    Raises:
        DataError: 'shuffled' with a single clip.
    """

    def __init__(self, dataset: AudioVisualDataset, sound: str, seed: int) -> None:
        self.dataset = dataset
        self.sound = sound
        self.seed = seed
        if sound == "shuffled" and len(dataset) < 2:
            raise DataError("--audio shuffled needs a split of two clips or more.")
        self.other = derangement(len(dataset), seed)

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The item, with the log-mel of its real frames replaced."""
        item = self.dataset[index]
        real = len(self.dataset.clips[index].frames)
        replaced = torch.zeros_like(item["log_mel"])
        replaced[:real] = self._log_mel(index, real)
        return {**item, "log_mel": replaced}

    def _log_mel(self, index: int, patches: int) -> Tensor:
        if self.sound == "shuffled":
            other = self.dataset.read_log_mel(self.dataset.clips[self.other[index]])
            # Clips of avss are 5 or 10 seconds long; a shorter sound is repeated.
            return other[torch.arange(patches) % len(other)]
        front_end = self.dataset.front_end
        waveform = torch.zeros(front_end.length(patches, SAMPLE_RATE))
        if self.sound == "noise":
            generator = torch.Generator().manual_seed(step_seed(self.seed, index))
            waveform = NOISE_LEVEL * torch.randn(waveform.shape, generator=generator)
        return front_end.patches(waveform.numpy(), SAMPLE_RATE, patches)


def derangement(count: int, seed: int) -> list[int]:
    """A seeded permutation of 0..count-1 without fixed points: one cycle through all numbers in random order."""
    cycle = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    following = dict(zip(cycle, [*cycle[1:], *cycle[:1]], strict=True))
    return [following[number] for number in range(count)]
