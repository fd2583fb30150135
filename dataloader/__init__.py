"""Data sets in AVSBench's layouts and of one's own; the loaders are in `dataloader.data_module`."""

from collections.abc import Mapping
from typing import Any

from dataloader.base import AudioVisualDataset, Clip
from dataloader.binary import MS3Dataset, S4Dataset
from dataloader.folder import FolderDataset
from dataloader.semantic import AVSSDataset
from utils.registry import DATASETS, build


def build_dataset(cfg: Mapping[str, Any], *, where: str = "dataset", **extra: Any) -> AudioVisualDataset:
    """The data set that one split's config describes.

    Args:
        cfg: `type` and constructor arguments, as in `cfg.dataset.train`.
        where: the dictionary's key in the config, for messages.
        **extra: further constructor arguments, replacing the config's.

    Raises:
        ConfigError: an unknown type or key.
        DataError: the table is missing or broken, or has no clip of the split.
    """
    dataset: AudioVisualDataset = build(DATASETS, {**cfg, **extra}, where=where)
    return dataset


__all__ = [
    "AVSSDataset",
    "AudioVisualDataset",
    "Clip",
    "FolderDataset",
    "MS3Dataset",
    "S4Dataset",
    "build_dataset",
]
