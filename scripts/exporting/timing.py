"""Time per frame."""

import statistics
import time

import torch
from torch import Tensor

from scripts.exporting.formats import Run

WARM_UP, REPEATS = 2, 7


@torch.no_grad()
def time_per_frame(run: Run, example: tuple[Tensor, Tensor]) -> float:
    """Median over 7 calls, in milliseconds per frame, after two calls to warm up.

    Args:
        run: (log_mel, frames) -> logits, on the CPU.
        example: its inputs, N frames.
    """
    for _ in range(WARM_UP):
        run(*example)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run(*example)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds) / example[1].shape[0]
