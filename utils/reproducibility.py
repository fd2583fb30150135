"""Seeds and determinism of a process."""

import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def step_seed(seed: int, *numbers: int) -> int:
    """One 63-bit seed of several numbers: dropout and routing of a step depend on (seed, epoch, batch, rank) alone.

    A run that goes on therefore draws what an uninterrupted one draws, whatever happened in between.
    """
    state = np.random.SeedSequence((seed % 2**64, *numbers)).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))


def configure_torch(process: Mapping[str, Any]) -> None:
    """Apply the config's choices that hold for the whole process: matrix precision and determinism."""
    torch.set_float32_matmul_precision(process["matmul_precision"])
    torch.backends.cudnn.allow_tf32 = process["matmul_precision"] != "highest"  # else convolutions round all the same
    if process["deterministic"]:
        # On a GPU some operators have no deterministic backward (max pooling) or none in this mode (fused attention):
        # these warn and run.
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
        # Nothing reads memory that was not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
