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
    """A 63-bit seed from several numbers.

    Dropout and routing of a step are seeded by (seed, epoch, batch, rank) only, so that a resumed run draws the same
    random numbers as an uninterrupted one.
    """
    state = np.random.SeedSequence((seed % 2**64, *numbers)).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(1))


def configure_torch(process: Mapping[str, Any]) -> None:
    """Apply a config's process-wide settings: matrix precision and determinism."""
    torch.set_float32_matmul_precision(process["matmul_precision"])
    torch.backends.cudnn.allow_tf32 = process["matmul_precision"] != "highest"  # convolutions would use TF32 otherwise
    if process["deterministic"]:
        # On a GPU some operators have no deterministic backward pass (max pooling, fused attention): they only warn.
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
        # No operator reads uninitialised memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
