"""Negative clips for training: sounds that none of the visible objects makes, with empty masks."""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dataloader.audio import FrontEnd
from dataloader.audio_ablation import NOISE_LEVEL, repeated, silence, white_noise
from dataloader.options import checked_options, number
from utils.reproducibility import step_seed

if TYPE_CHECKING:
    from dataloader.base import AudioVisualDataset

KINDS = ("silence", "noise", "off_screen")
NOISES = 32
"""Different noises of a run: few enough that a frozen encoder's embeddings of them are computed once and kept."""
NOISE_RANGE_DB = (-14.0, 6.0)
"""Levels of the noises, relative to NOISE_LEVEL."""


class Negatives:
    """With probability `rate` an item's sound is replaced, and its masks are emptied.

    Silence and noise go through the data set's front end, as all sounds do; noise is one of NOISES, of different
    levels, and an off-screen sound is another clip's as it is. All of these come again in later epochs, so that a
    cache of embeddings serves them.

    An off-screen sound is of a clip of which no sounding label is visible; where it is unknown what is visible beside
    the sounding objects, it is also of another group (`Donors`). A clip for which the labels leave no such clip hears
    silence instead.

    Args:
        owner: the data set's class, for messages.
        options: `rate`, 0 to 1, and the relative frequencies `silence` (0.25), `noise` (0.25) and `off_screen` (0.5),
            the mixture of EASE's training.

    Raises:
        ConfigError: an unknown key or a value out of range.
    """

    def __init__(self, owner: str, options: Mapping[str, Any]) -> None:
        where = f"{owner}: negatives"
        values = checked_options(where, options, {"rate": None, "silence": 0.25, "noise": 0.25, "off_screen": 0.5})
        self.rate = number(f"{where}.rate", values["rate"], 0, 1)
        weights = [number(f"{where}.{kind}", values[kind], 0) for kind in KINDS]
        if not sum(weights):
            number(f"{where}: the sum of {', '.join(KINDS)}", 0.0, 1e-9)
        self.weights = [weight / sum(weights) for weight in weights]

    @property
    def needs_donors(self) -> bool:
        """Whether other clips' sounds are used."""
        return self.rate > 0 and self.weights[KINDS.index("off_screen")] > 0

    def draw(
        self, dataset: "AudioVisualDataset", index: int, patches: int, rng: np.random.Generator
    ) -> tuple[Tensor, int | None] | None:
        """The sound of a negative clip, or None where the clip keeps its own.

        Args:
            dataset: of the clip.
            index: of the clip.
            patches: number of its real frames.
            rng: source of the draws; their number is the same for all clips.

        Returns:
            (patches, *front_end.shape) float32, and the number of the clip whose sound it is, None for noise and
            silence.
        """
        chance, turn = rng.random(), int(rng.integers(2**32))
        kind = KINDS[int(rng.choice(len(KINDS), p=self.weights))]
        if chance >= self.rate:
            return None
        if kind == "off_screen":
            other, _ = dataset.donors.choose(index, np.random.default_rng(turn))
            if other is not None:
                return repeated(dataset.read_log_mel(dataset.clips[other]), patches), other
        if kind == "noise":
            return fixed_noise(dataset.front_end, dataset.num_frames, dataset.seed, turn % NOISES)[:patches], None
        return silence(dataset.front_end, patches), None


@functools.lru_cache(maxsize=NOISES)
def fixed_noise(front_end: FrontEnd, patches: int, seed: int, turn: int) -> Tensor:
    """One of the noises of a run, (patches, *front_end.shape) float32; not to be changed in place."""
    level = np.random.default_rng((seed, turn)).uniform(*NOISE_RANGE_DB)
    return white_noise(front_end, patches, step_seed(seed, turn), NOISE_LEVEL * 10 ** (level / 20))
