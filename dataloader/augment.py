"""Augmentation of training clips: sounds as waveforms and log-mels, pictures alike over all frames of a clip."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchaudio.functional import mask_along_axis_iid
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dataloader.audio import FrontEnd, mono, read_wave
from dataloader.audio_ablation import silence
from dataloader.front_ends import SILENCE_RMS
from dataloader.images import IMAGENET_MEAN, IMAGENET_STD
from dataloader.options import checked_options, number, number_range
from dataloader.tables import inside
from utils.errors import ConfigError

if TYPE_CHECKING:
    from dataloader.base import AudioVisualDataset

KEYS = ("mix", "gain_db", "shift_seconds", "spec_augment", "scale", "crop", "colour")
LONGEST_SHIFT = 0.9  # seconds; a window lasts 0.96 s
FADE_SECONDS = 0.01
Samples = npt.NDArray[np.float64]


class Augment:
    """Random changes of training clips; each is off unless its key is given.

    Sounds are changed window by window (a window is what the front end sees of one frame), so that nothing moves from
    one second into another, and go through the front end of all other sounds. Windows quieter than SILENCE_RMS stay as
    they are: silent seconds stay silent. Masks stay those of the clip's own objects. The sounds of negative clips are
    changed alike, so that nothing but what sounds tells them apart.

    Args:
        owner: the data set's class, for messages.
        options:
            mix: dict(rate, level_db=(-12, 0)): with probability `rate` the sound of another clip is added, of which no
                sounding label is visible in this one (`Donors`), at an RMS relative to this clip's drawn from
                `level_db`. Nothing is added where the labels leave no such clip.
            gain_db: largest change of the clip's level, either way, dB.
            shift_seconds: largest shift of the sound within each window, either way, circular; up to 0.9.
            spec_augment: dict(time=0.2, frequency=0.2): largest share of a log-mel's frames and bands that is replaced
                by silence (SpecAugment, Park et al., 2019), drawn for each window.
            scale: (smallest, largest) factor by which pictures are scaled about their centre, drawn log-uniformly.
            crop: True: the scaled picture is placed at random, with `scale` alone at the centre.
            colour: dict(brightness, contrast, saturation, hue), as in torchvision's ColorJitter: factors are drawn from
                1 - x to 1 + x, hue from -x to x (0.5 at most).

    Raises:
        ConfigError: an unknown key or a value out of range.
    """

    def __init__(self, owner: str, options: Mapping[str, Any]) -> None:
        where = f"{owner}: augment"
        values = checked_options(where, options, dict.fromkeys(KEYS, False))
        given = {key: value for key, value in values.items() if value not in (False, None)}
        self.mix_rate, self.mix_level = 0.0, (0.0, 0.0)
        if "mix" in given:
            mix = checked_options(f"{where}.mix", given["mix"], {"rate": None, "level_db": (-12.0, 0.0)})
            self.mix_rate = number(f"{where}.mix.rate", mix["rate"], 0, 1)
            self.mix_level = number_range(f"{where}.mix.level_db", mix["level_db"], -60, 30)
        self.gain_db = number(f"{where}.gain_db", given.get("gain_db", 0), 0, 60)
        self.shift_seconds = number(f"{where}.shift_seconds", given.get("shift_seconds", 0), 0, LONGEST_SHIFT)
        self.time_share = self.frequency_share = 0.0
        if "spec_augment" in given:
            spec = checked_options(f"{where}.spec_augment", given["spec_augment"], {"time": 0.2, "frequency": 0.2})
            self.time_share = number(f"{where}.spec_augment.time", spec["time"], 0, 1)
            self.frequency_share = number(f"{where}.spec_augment.frequency", spec["frequency"], 0, 1)
        self.scale = number_range(f"{where}.scale", given.get("scale", (1.0, 1.0)), 0.1, 10)
        self.crop = given.get("crop", False)
        if self.crop is not False and (self.crop is not True or "scale" not in given):
            raise ConfigError(f"{where}.crop={self.crop!r}: give True or False, and True together with {where}.scale.")
        self.colour = {}
        if "colour" in given:
            found = checked_options(f"{where}.colour", given["colour"], dict.fromkeys(_COLOUR, 0.0))
            self.colour = {
                key: number(f"{where}.colour.{key}", value, 0, 0.5 if key == "hue" else 1)
                for key, value in found.items()
            }

    @property
    def changes_waves(self) -> bool:
        """Whether wave files are needed."""
        return self.mix_rate > 0 or self.gain_db > 0 or self.shift_seconds > 0

    @property
    def needs_donors(self) -> bool:
        """Whether other clips' sounds are used."""
        return self.mix_rate > 0

    def sound(
        self,
        dataset: "AudioVisualDataset",
        index: int,
        source: int | None,
        log_mel: Tensor,
        seconds: Sequence[int],
        rng: np.random.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Change the sound of some frames of a clip.

        Args:
            dataset: of the clip.
            index: of the clip that is seen.
            source: of the clip that is heard; None for noise and silence, of which the log-mel alone is changed.
            log_mel: (n, *front_end.shape), of these frames.
            seconds: numbers of these frames in the clip; a shorter source is repeated.
            rng: source of the draws; their number is the same for all clips.

        Returns:
            log_mel: (n, *front_end.shape) float32.
            changed: (n,) bool: False where the log-mel is as it was.
        """
        mixed = rng.random() < self.mix_rate
        turns = rng.integers(2**32, size=2).tolist()
        level, gain = rng.uniform(*self.mix_level), rng.uniform(-self.gain_db, self.gain_db)
        shift = rng.uniform(-self.shift_seconds, self.shift_seconds)
        donor = dataset.donors.choose(index, np.random.default_rng(turns[0]))[0] if mixed else None
        changed = torch.zeros(len(seconds), dtype=torch.bool)
        if source is not None and (donor is not None or self.gain_db or self.shift_seconds):
            heard = [second % len(dataset.clips[source].frames) for second in seconds]
            patches, audible = _changed_patches(dataset, source, max(heard) + 1, donor, level, gain, shift)
            changed = audible[heard]
            log_mel = torch.where(changed.view(-1, *[1] * (log_mel.ndim - 1)), patches[heard], log_mel)
        if self.time_share or self.frequency_share:
            return self._masked(dataset.front_end, log_mel, changed, turns[1])
        return log_mel, changed

    def picture(
        self, frames: Tensor, masks: Tensor, real: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, bool]:
        """Change the pictures of a clip, all alike; masks follow by nearest neighbour.

        Args:
            frames: (T, 3, H, W) float32, normalised by ImageNet's mean and deviation; new pixels beside a picture that
                becomes smaller are 0, the mean.
            masks: (T, H, W) uint8; 0 there.
            real: number of frames that are not padding.
            rng: source of the draws; their number is the same for all clips.

        Returns:
            frames, masks, and whether anything was changed.
        """
        scale = float(np.exp(rng.uniform(*np.log(self.scale))))
        place = rng.uniform(-1, 1, 2) if self.crop else np.zeros(2)
        jitter = rng.uniform(-1, 1, len(_COLOUR))
        changed = False
        if any(self.colour.values()):
            frames, changed = frames.clone(), True
            frames[:real] = self._jittered(frames[:real], jitter)
        if scale != 1:
            changed = True
            height, width = frames.shape[-2:]
            slack = abs(scale - 1) / 2
            move = [round(float(place[0]) * slack * width), round(float(place[1]) * slack * height)]
            options: dict[str, Any] = {"angle": 0.0, "translate": move, "scale": scale, "shear": [0.0, 0.0]}
            frames = F.affine(frames, interpolation=InterpolationMode.BILINEAR, **options)
            masks = F.affine(masks, interpolation=InterpolationMode.NEAREST, **options)
        return frames, masks, changed

    def _masked(self, front_end: FrontEnd, log_mel: Tensor, changed: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """SpecAugment: one band of frames and one of frequencies of each window that is not silent, set to silence."""
        if log_mel.ndim < 3:
            raise ConfigError(f"augment.spec_augment needs log-mels, and front_end={front_end.name!r} gives none.")
        quiet = silence(front_end, 1).expand_as(log_mel)
        audible = (log_mel != quiet).flatten(1).any(1)
        kept = torch.ones(len(log_mel), 1, *log_mel.shape[-2:])
        with torch.random.fork_rng(devices=[]):  # torchaudio draws from the global generator
            torch.manual_seed(seed)
            for axis, share in ((2, self.time_share), (3, self.frequency_share)):
                kept = mask_along_axis_iid(kept, int(share * kept.shape[axis]), 0.0, axis)
        kept = kept.view(len(log_mel), *[1] * (log_mel.ndim - 3), *log_mel.shape[-2:])
        masked = torch.where(kept > 0, log_mel, quiet)
        return masked, changed | (audible & (masked != log_mel).flatten(1).any(1))

    def _jittered(self, frames: Tensor, jitter: npt.NDArray[np.float64]) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = (frames * std + mean).clamp(0, 1)
        for (key, adjust), draw in zip(_COLOUR.items(), jitter.tolist(), strict=True):
            if self.colour[key]:
                pixels = adjust(pixels, draw * self.colour[key] + (key != "hue"))
        return (pixels - mean) / std


_COLOUR: dict[str, Any] = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}


def _changed_patches(
    dataset: "AudioVisualDataset", source: int, patches: int, donor: int | None, level: float, gain: float, shift: float
) -> tuple[Tensor, Tensor]:
    """A clip's sound shifted within its windows, at another level, with another clip's sound added.

    Args:
        dataset: of the clips.
        source: number of the clip.
        patches: number of windows, from the first.
        donor: number of the clip whose sound is added, if any.
        level: of the added sound relative to the clip's, dB.
        gain: of the clip's own sound, dB.
        shift: seconds.

    Returns:
        (patches, *front_end.shape) float32, and (patches,) bool: False where the window is silent and nothing was done.

    Raises:
        DataError: a wave file is missing or cannot be read.
    """
    rate, samples = _read_samples(dataset, source)
    spans = _spans(dataset, source, rate)
    own = [samples[span] for span in spans]
    added = [np.zeros_like(window) for window in own]
    if donor is not None:
        donor_rate, donor_samples = _read_samples(dataset, donor)
        if donor_rate != rate:
            import librosa

            donor_samples = librosa.resample(donor_samples, orig_sr=donor_rate, target_sr=rate, res_type="soxr_hq")
        donor_spans = _spans(dataset, donor, rate)
        # Resampling rounds the length.
        donor_samples = np.pad(donor_samples, (0, max(0, donor_spans[-1].stop - len(donor_samples))))
        added = [donor_samples[donor_spans[second % len(donor_spans)]] for second in range(len(own))]
        factor = _relative_level(own, added, level)
        added = [factor * _ramp(len(window), rate) * window for window in added]
    audible = [_rms(window) >= SILENCE_RMS for window in own]
    changed = samples.copy()
    for second in range(patches):
        if audible[second]:
            window = _rolled(own[second], round(shift * rate), rate) if shift else own[second]
            window = window * 10 ** (gain / 20) + added[second]
            changed[spans[second]] = np.clip(window, -1, 1)
    return dataset.front_end.patches(changed, rate, patches), torch.tensor(audible[:patches])


def _rolled(window: Samples, samples: int, rate: int) -> Samples:
    """A window shifted in a circle, faded at its ends and where they meet: without clicks."""
    ramp = _ramp(len(window), rate)
    return ramp * np.roll(ramp * window, samples)


def _ramp(samples: int, rate: int) -> Samples:
    """(samples,): 1, rising from 0 and falling to 0 within FADE_SECONDS at the ends."""
    rise = np.minimum(1.0, np.arange(samples) / (FADE_SECONDS * rate))
    return rise * rise[::-1]


def _read_samples(dataset: "AudioVisualDataset", index: int) -> tuple[int, Samples]:
    """Sample rate in Hz and (samples,) float64 of a clip, zero beyond the end of the file."""
    clip = dataset.clips[index]
    dataset.materialise(clip)
    path = inside(dataset.roots()["wav"], clip.wav, clip.row.location)
    stored, rate = read_wave(path, max_seconds=dataset.max_seconds)
    missing = dataset.front_end.length(len(clip.frames), rate) - len(stored)
    return rate, np.pad(mono(stored), (0, max(0, missing)))


def _spans(dataset: "AudioVisualDataset", index: int, rate: int) -> list[slice]:
    """What the front end sees of each frame of a clip."""
    length = dataset.front_end.length
    ends = [length(second + 1, rate) for second in range(len(dataset.clips[index].frames))]
    return [slice(end - length(1, rate), end) for end in ends]


def _relative_level(own: Sequence[Samples], added: Sequence[Samples], level_db: float) -> float:
    """Factor that brings what is audible of `added` to a level relative to what is audible of `own`; 0 for silence."""
    levels = [
        np.sqrt(np.mean([rms**2 for window in windows if (rms := _rms(window)) >= SILENCE_RMS] or [0.0]))
        for windows in (own, added)
    ]
    return float(levels[0] / levels[1] * 10 ** (level_db / 20)) if levels[1] else 0.0


def _rms(window: Samples) -> float:
    return float(np.sqrt(np.mean(np.square(window))))
