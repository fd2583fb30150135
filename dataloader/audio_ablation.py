"""Audio ablations: a data set's sounds replaced by silence, noise, or the sounds of other clips."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataloader.audio import SAMPLE_RATE, FrontEnd
from dataloader.off_screen import Donors
from utils.errors import DataError
from utils.reproducibility import step_seed

if TYPE_CHECKING:
    from dataloader.base import AudioVisualDataset

NOISE_LEVEL = 0.1
"""Standard deviation of the noise, full scale 1; about that of loud speech."""


class ReplacedSound(Dataset[dict[str, Any]]):
    """A data set with the sound of every clip replaced.

    Args:
        dataset: of frames and masks; its front end computes the log-mels.
        sound: 'silence' (the log-mel of zeros), 'noise' (white noise, drawn per clip), 'shuffled' (each clip gets the
            sound of another one; every sound is used once) or 'off_screen' (the sound of a clip of another group, see
            `dataloader.off_screen`; items then have the key `counted`, () bool: False, and silence, where no clip's
            sound is off-screen in this one).
        seed: of all draws.

    Attributes:
        other: number of the clip whose sound each clip gets, for 'shuffled' and 'off_screen'; None where none fits.
        rules: rule of `Donors.candidates` -> number of clips, for 'off_screen'.
        labels: where the labels of 'off_screen' come from.

    Raises:
        DataError: 'shuffled' or 'off_screen' with a single clip.
    """

    def __init__(self, dataset: "AudioVisualDataset", sound: str, seed: int) -> None:
        self.dataset = dataset
        self.sound = sound
        self.seed = seed
        if sound == "shuffled" and len(dataset) < 2:
            raise DataError("--audio shuffled needs a split of two clips or more.")
        self.rules: dict[str, int] = {}
        self.labels = ""
        if sound == "off_screen":
            donors = Donors(dataset)
            chosen = [donors.choose(index, np.random.default_rng((seed, index))) for index in range(len(dataset))]
            self.other: list[int | None] = [other for other, _ in chosen]
            self.rules, self.labels = dict(Counter(rule for _, rule in chosen)), donors.source
        else:
            self.other = list(derangement(len(dataset), seed))

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The item, with the log-mel of its real frames replaced."""
        item = self.dataset[index]
        real = len(self.dataset.clips[index].frames)
        replaced = torch.zeros_like(item["log_mel"])
        replaced[:real] = self._log_mel(index, real)
        counted = {"counted": torch.tensor(self.other[index] is not None)} if self.sound == "off_screen" else {}
        return {**item, "log_mel": replaced, **counted}

    def _log_mel(self, index: int, patches: int) -> Tensor:
        other = self.other[index]
        if self.sound in ("shuffled", "off_screen") and other is not None:
            return repeated(self.dataset.read_log_mel(self.dataset.clips[other]), patches)
        if self.sound == "noise":
            return white_noise(self.dataset.front_end, patches, step_seed(self.seed, index))
        return silence(self.dataset.front_end, patches)


def repeated(log_mel: Tensor, patches: int) -> Tensor:
    """The first `patches` patches of a sound; a shorter one (avss has clips of 5 and 10 seconds) is repeated."""
    return log_mel[torch.arange(patches) % len(log_mel)]


def silence(front_end: FrontEnd, patches: int) -> Tensor:
    """(patches, *front_end.shape) float32 of a waveform of zeros."""
    return front_end.patches(np.zeros(front_end.length(patches, SAMPLE_RATE), np.float32), SAMPLE_RATE, patches)


def white_noise(front_end: FrontEnd, patches: int, seed: int, level: float = NOISE_LEVEL) -> Tensor:
    """(patches, *front_end.shape) float32 of Gaussian noise with standard deviation `level`, full scale 1."""
    generator = torch.Generator().manual_seed(seed)
    waveform = level * torch.randn(front_end.length(patches, SAMPLE_RATE), generator=generator)
    return front_end.patches(waveform.numpy(), SAMPLE_RATE, patches)


def derangement(count: int, seed: int) -> list[int]:
    """A seeded permutation of 0..count-1 without fixed points: one cycle through all numbers in random order."""
    cycle = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    following = dict(zip(cycle, [*cycle[1:], *cycle[:1]], strict=True))
    return [following[number] for number in range(count)]
