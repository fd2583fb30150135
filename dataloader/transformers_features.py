"""Front ends of transformers' audio models: the model's own feature extractor on each second of sound."""

import functools
import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dataloader.audio import FrontEnd, mono
from dataloader.front_ends import SILENCE_RMS
from utils.errors import ConfigError
from utils.optional import import_optional

SECONDS = 0.96
"""Length of a window."""


@functools.cache
def transformers_front_end(name: str) -> FrontEnd:
    """The front end 'transformers:NAME'. Window t starts at t seconds and lasts 0.96 s; silence gives zeros.

    Args:
        name: of a model on the hub, or its folder.

    Raises:
        ConfigError: transformers is not installed, or the model has no feature extractor for sound.
    """
    transformers = import_optional("transformers", f"front_end='transformers:{name}'")
    try:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(name)
        rate = int(extractor.sampling_rate)
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"front_end='transformers:{name}': no audio feature extractor ({reason})") from error
    # CLAP: of a sound shorter than its window nothing is cut, and one map is made instead of four.
    options = {"truncation": "rand_trunc"} if hasattr(extractor, "nb_max_samples") else {}
    window = round(SECONDS * rate)

    def features(signal: npt.NDArray[np.float64]) -> Tensor:
        out = extractor(signal.astype(np.float32), sampling_rate=rate, return_tensors="pt", **options)
        return torch.as_tensor(out[extractor.model_input_names[0]][0], dtype=torch.float32)

    shape = tuple(features(np.zeros(window)).shape)

    def patches(samples: npt.NDArray[np.generic], sample_rate: int, count: int) -> Tensor:
        signal = mono(samples)
        if sample_rate != rate:
            import librosa

            signal = librosa.resample(signal, orig_sr=sample_rate, target_sr=rate, res_type="soxr_hq")
        found = torch.zeros(count, *shape)
        for index in range(count):
            second = signal[index * rate : index * rate + window]
            second = np.pad(second, (0, window - len(second)))  # resampling rounds the length down
            if math.sqrt(np.square(second).mean()) >= SILENCE_RMS:
                found[index] = features(second)
        return found

    def length(count: int, sample_rate: int) -> int:
        return round((count - 1 + SECONDS) * sample_rate) + 1 if count else 0

    # The settings of the extractor decide the features, whatever the name of its folder.
    settings = hashlib.sha256(_settings(extractor).encode()).hexdigest()[:16]
    return FrontEnd(f"transformers:{name}", f"transformers-1-{settings}", shape, length, patches)


def _settings(extractor: Any) -> str:
    return f"{type(extractor).__name__} {extractor.to_json_string()}"
