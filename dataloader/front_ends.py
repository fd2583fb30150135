"""Audio front ends by name; audio encoders name theirs by an attribute (`front_end = "aisfx"`)."""

import functools

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dataloader.audio import VGGISH, FrontEnd, mono
from utils.errors import ConfigError
from utils.registry import suggestion

SAMPLE_RATE = 44_100  # Hz
WINDOW = 42_336  # samples of a patch, 0.96 s
FFT_LENGTH, HOP_LENGTH = 2048, 1024
MEL_BINS, MEL_FRAMES = 96, 41
SCALE = 9.457798957824707
"""Divisor of the log-mel in the training of aiSFX's weights."""
SILENCE_RMS = 0.005
"""RMS of a window, full scale 1, below which it counts as silence: -46 dB, above the noise floor of recordings."""


def aisfx_log_mel(samples: npt.NDArray[np.generic], sample_rate: int, patches: int) -> Tensor:
    """Input of aiSFX (Cantil & Serra, 2022): log10(1 + 10^4 mel power) / 9.4578 of each window divided by its peak.

    Window t starts at t seconds and lasts 0.96 s. The division by the peak removes loudness; silent windows
    are therefore set to zero.

    Args:
        samples: (n,) or (n, channels), int16 or floats with full scale 1.
        sample_rate: Hz; resampled to 44.1 kHz (soxr, HQ).
        patches: number of windows.

    Returns:
        (patches, 1, 41, 96) float32.
    """
    signal = mono(samples)
    if sample_rate != SAMPLE_RATE:
        import librosa

        signal = librosa.resample(signal, orig_sr=sample_rate, target_sr=SAMPLE_RATE, res_type="soxr_hq")
    out = torch.zeros(patches, 1, MEL_FRAMES, MEL_BINS)
    hann = torch.hann_window(FFT_LENGTH, periodic=True, dtype=torch.float64)
    for index in range(patches):
        window = torch.from_numpy(signal[index * SAMPLE_RATE : index * SAMPLE_RATE + WINDOW].copy())
        window = F.pad(window, (0, WINDOW - len(window)))  # resampling rounds the length down
        if float(window.square().mean().sqrt()) < SILENCE_RMS:
            continue
        centred = F.pad(window / window.abs().max(), (FFT_LENGTH // 2, FFT_LENGTH // 2))
        frames = centred.unfold(0, FFT_LENGTH, HOP_LENGTH)[:MEL_FRAMES] * hann
        power = torch.fft.rfft(frames).abs().square()  # (MEL_FRAMES, FFT_LENGTH / 2 + 1)
        out[index, 0] = torch.log10(1 + 1e4 * (power @ _mel_weights())) / SCALE
    return out


def aisfx_length(patches: int, sample_rate: int) -> int:
    """Samples that hold `patches` windows: (patches - 1) + 0.96 seconds, and one sample for rounding."""
    return round((patches - 1 + WINDOW / SAMPLE_RATE) * sample_rate) + 1 if patches else 0


def front_end(name: str) -> FrontEnd:
    """The front end of a name; 'transformers:MODEL' is that of a model of transformers.

    Raises:
        ConfigError: an unknown name.
    """
    if name.startswith("transformers:"):
        from dataloader.transformers_features import transformers_front_end

        return transformers_front_end(name.removeprefix("transformers:"))
    if name not in FRONT_ENDS:
        raise ConfigError(f"front_end={name!r} is not an audio front end: {suggestion(name, list(FRONT_ENDS))}")
    return FRONT_ENDS[name]


AISFX = FrontEnd(
    name="aisfx",
    version="aisfx-1",
    shape=(1, MEL_FRAMES, MEL_BINS),
    length=aisfx_length,
    patches=aisfx_log_mel,
)
FRONT_ENDS = {each.name: each for each in (VGGISH, AISFX)}


@functools.cache
def _mel_weights() -> Tensor:
    """(1025, 96) float64: HTK mel triangles from 0 to 22,050 Hz, each divided by its sum."""
    import librosa

    weights = librosa.filters.mel(
        sr=SAMPLE_RATE, n_fft=FFT_LENGTH, n_mels=MEL_BINS, fmin=0.0, fmax=SAMPLE_RATE / 2, htk=True, norm=1.0
    )
    return torch.from_numpy(weights.T.astype(np.float64))
