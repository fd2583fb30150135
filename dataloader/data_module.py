"""Loaders for training, validation and test; the order of clips depends on seed and epoch only."""

import os
import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from dataloader.frame_items import FrameItems
from utils.registry import DATASETS, build
from utils.reproducibility import step_seed

if TYPE_CHECKING:
    from dataloader.base import AudioVisualDataset


class ClipBatchSampler(Sampler[list[int]]):
    """Batches of clip indices for one of several processes, determined by seed and epoch.

    In training, `world_size` processes with batch size `b` together see the batches of one process with batch size
    `world_size * b`, except that the last batch repeats the first clips until all processes have equally many. In
    evaluation the batches of a single process are distributed round-robin without repetition: sums over all processes
    count every clip once, and scores that depend on the batches do not change.

    Args:
        clips: number of clips in the split.
        batch_size: clips per batch and process.
        shuffle: True for training (a new order per epoch), False for evaluation (in order).
        seed: of the order.
        drop_last: drop an incomplete last batch.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        clips: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """See the class."""
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size={batch_size}, rank={rank}, world_size={world_size} do not fit together")
        self.clips = clips
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that determines the order."""
        self.epoch = epoch

    def skip(self, batches: int) -> None:
        """Start the next iteration, and only that one, after `batches` batches: to resume within an epoch.

        The length stays that of the whole epoch.
        """
        self._skip = batches

    def __len__(self) -> int:
        """Number of batches of this process per epoch."""
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of clip indices."""
        batches = self._batches()[self._skip :]
        self._skip = 0
        yield from batches

    def order(self) -> list[int]:
        """All clips in the order of this epoch, before they are distributed over processes."""
        if not self.shuffle:
            return list(range(self.clips))
        generator = torch.Generator().manual_seed(step_seed(self.seed, self.epoch))
        return torch.randperm(self.clips, generator=generator).tolist()

    def _batches(self) -> list[list[int]]:
        order = self.order()
        if not self.shuffle:
            batches = [order[start : start + self.batch_size] for start in range(0, self.clips, self.batch_size)]
            if self.drop_last and batches and len(batches[-1]) < self.batch_size:
                batches.pop()
            return batches[self.rank :: self.world_size]
        whole = self.batch_size * self.world_size
        if self.drop_last:
            order = order[: len(order) // whole * whole]
        short = -len(order) % self.world_size
        order += (order * self.world_size)[:short]
        return [order[start : start + whole][self.rank :: self.world_size] for start in range(0, len(order), whole)]


class DataModule:
    """The data sets of `cfg.dataset` and their loaders.

    Reads `process.num_workers`, `process.seed` and `process.drop_last` (training).

    Args:
        cfg: a loaded config.
        rank: of this process.
        world_size: number of processes that share the clips.
        overrides: constructor arguments for the data sets of all splits, for example `{'audio': 'wav'}`.
    """

    def __init__(
        self, cfg: Mapping[str, Any], *, rank: int = 0, world_size: int = 1, overrides: Mapping[str, Any] | None = None
    ) -> None:
        """See the class."""
        process = cfg["process"]
        self.splits: Mapping[str, Any] = cfg["dataset"]
        self.rank = rank
        self.world_size = world_size
        self.overrides = dict(overrides or {})
        self.num_workers = int(process.get("num_workers", 0))
        self.seed = int(process.get("seed", 0) or 0)
        self.drop_last = bool(process.get("drop_last", False))
        self._datasets: dict[str, AudioVisualDataset] = {}

    def dataset(self, split: str) -> "AudioVisualDataset":
        """The data set of 'train', 'val' or 'test', built on first use.

        Raises:
            ConfigError: the config has no such split, or a wrong one.
            DataError: its table is missing or broken, or has no clip of the split.
        """
        if split not in self._datasets:
            cfg = self.splits.get(split)
            merged = {**cfg, **self.overrides} if isinstance(cfg, Mapping) else cfg
            seed = {} if isinstance(cfg, Mapping) and "seed" in cfg else {"seed": self.seed}
            self._datasets[split] = build(DATASETS, merged, where=f"dataset.{split}", **seed)
        return self._datasets[split]

    def loader(self, split: str, *, shuffle: bool = False) -> DataLoader[dict[str, Any]]:
        """A loader for a split; batches are items with a leading axis of clips, `name` a list.

        Args:
            split: 'train', 'val' or 'test'.
            shuffle: True for the order of training, False for the order of the table.
        """
        clips = self.dataset(split)
        dataset: AudioVisualDataset | FrameItems = FrameItems(clips) if clips.single_frames and shuffle else clips
        batches = _EpochBatches(
            dataset,
            clips.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            drop_last=self.drop_last and shuffle,
            rank=self.rank,
            world_size=self.world_size,
        )
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            generator=torch.Generator().manual_seed(step_seed(self.seed, 1)),
        )


class _EpochBatches(ClipBatchSampler):
    """Passes the epoch on to the data set, for its random changes."""

    def __init__(self, dataset: "AudioVisualDataset | FrameItems", batch_size: int, **options: Any) -> None:
        super().__init__(len(dataset), batch_size, **options)
        self.dataset = dataset

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.dataset.set_epoch(epoch)


def _start_worker(worker: int) -> None:
    """Seed Python's and numpy's generators from torch's seed of the worker; one thread per worker.

    Workers leave the run's process group, so that Ctrl-C or a scheduler's SIGTERM to the group does not end them before
    the run has finished its step and saved. They end with their parent.
    """
    os.setpgrp()
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.set_num_threads(1)
