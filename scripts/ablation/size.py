"""Parameters and FLOPs of a config's model: python -m scripts.ablation.size CONFIG prints them as JSON."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.runtime import ROOT

SECONDS = 600


def image_size(split: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the items of a split's config, pixels."""
    if split["type"] == "AVSSDataset" and split.get("crop_img_and_mask", True):
        side = int(split.get("crop_size", 224))
        return side, side
    height, width = split.get("img_size", (224, 224))
    return int(height), int(width)


def measure(cfg: Any) -> dict[str, float]:
    """Size of a model.

    Args:
        cfg: from `utils.config.load_config`.

    Returns:
        `parameters`: their number, frozen ones included. `flops`: of the evaluation of one clip, in matrix products and
        convolutions, a multiply-add counted as two and attention in its plain form, as in scripts/benchmark/tasks.py.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from model import build_model

    torch.manual_seed(0)
    # Without gradients from the start: the counter fails on views of parameters under no_grad.
    model: Any = build_model(cfg.model).eval().requires_grad_(False)
    frames = int(cfg.model.get("num_frames", 5))
    height, width = image_size(cfg.dataset["test"])
    inputs = (torch.randn(frames, *model.audio_encoder.input_shape), torch.randn(frames, 3, height, width))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "flops": counter.get_total_flops()}


def measured(config: Path) -> dict[str, float]:
    """`measure` in a process of its own, whose memory is free afterwards; empty where it fails."""
    command = [sys.executable, "-m", "scripts.ablation.size", str(config)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=SECONDS)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return found


if __name__ == "__main__":
    from utils.config import load_config

    print(json.dumps(measure(load_config(sys.argv[1]))))
