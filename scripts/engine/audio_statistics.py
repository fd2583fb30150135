"""Mean and deviation of the training sounds' embeddings, for `model.audio_norm='standardise'`."""

import torch
from lightning.fabric import Fabric
from torch import Tensor

from dataloader import AudioVisualDataset
from model.avs_model import AVSModel
from scripts.engine.feature_cache import FrozenFeatures
from utils.errors import ConfigError


def fit_audio_norm(
    model: AVSModel, dataset: AudioVisualDataset, embeddings: FrozenFeatures | None, fabric: Fabric
) -> None:
    """Fit the model's audio norm to a data set, where it asks for that; every process computes the same.

    Args:
        model: with its weights loaded.
        dataset: of training.
        embeddings: cached outputs of its audio encoder, None where they are not cached.
        fabric: launched.

    Raises:
        ConfigError: the audio encoder is trained, so that its outputs have no fixed statistics.
    """
    norm = model.audio_norm
    if norm is None or not norm.needs_statistics():
        return
    if not model.audio_encoder.frozen:
        raise ConfigError(
            "model.audio_norm='standardise' needs a frozen audio encoder: set model.audio_encoder.frozen=True, or "
            "model.audio_norm to 'batch' or 'layer'."
        )
    encode = embeddings or FrozenFeatures(model.audio_encoder, None, in_memory=False)
    clips = len(dataset.clips)
    found: list[Tensor] = [torch.empty(0)] * clips
    first = clips * fabric.global_rank // fabric.world_size
    for index in (*range(first, clips), *range(first)):  # processes start apart, and find each other's on disk
        found[index] = encode(dataset.read_log_mel(dataset.clips[index])[None])[0]
    norm.fit(found)
