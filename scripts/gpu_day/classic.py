"""The model with AVSegFormer's classic attention op (classic_msda.cu) in place of ours: evaluation and training step.

    python -m scripts.gpu_day.classic --device cuda --frames 5 --size 224 --json FILE

As in AVSegFormer, softmax and sampling locations are computed by PyTorch, and the op in float32 whatever the precision.
Without a GPU (--device cpu) the op's definition stands in for its kernel.
"""

import argparse
import contextlib
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from model.reference import relative_error
from ops.reference import ms_deform_attn_torch, sampling_locations
from scripts.benchmark import tasks

Shapes = tuple[tuple[int, int], ...]


def classic_attention(
    value: Tensor, shapes: Shapes, reference_points: Tensor, offsets: Tensor, logits: Tensor, backend: str = "auto"
) -> Tensor:
    """`ops.ms_deform_attn_fused` as AVSegFormer computes it; `reference_points` (Q, 2), the others as there."""
    weights = logits.float().flatten(-2).softmax(-1).view_as(logits)
    locations = sampling_locations(reference_points[None, :, None], offsets.float(), shapes)
    inputs = [tensor.float().contiguous() for tensor in (value, locations, weights)]
    kernel = _kernel(tuple(shapes), value.device.type)
    return kernel(*inputs).to(value.dtype)


@functools.cache
def _kernel(shapes: Shapes, device: str) -> Callable[..., Tensor]:
    """(value, locations, weights) -> output; made once, since it copies the shapes to the card."""
    if device == "cuda":
        from scripts.benchmark.ops import Classic

        return Classic(shapes)
    return lambda value, locations, weights: ms_deform_attn_torch(value, shapes, locations, weights)


@contextlib.contextmanager
def classic_op() -> Iterator[None]:
    """Within it, the model's attention layers call `classic_attention`."""
    with mock.patch("ops.module.ms_deform_attn_fused", classic_attention):
        yield


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds (medians) and peak MB of evaluation and training step with either op, and how far the logits differ."""
    with classic_op():
        classic, expected = _measure_one(request)
    ours, logits = _measure_one(request)
    named = {"ours": ours, "classic op": classic}
    found: dict[str, Any] = {
        f"{what}, {name}": result for name, results in named.items() for what, result in results.items()
    }
    return {**found, "relative error of the logits": relative_error(logits, expected)}


def _measure_one(request: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Results of evaluation and training step with the op that the layers call now, and the logits."""
    device = torch.device(request["device"])
    model = tasks.prepare(request)
    sample = tasks.batch(request)

    @torch.inference_mode()
    def evaluate() -> Tensor:
        with tasks.precision(request["precision"], device):
            logits: Tensor = model(*sample).logits
        return logits

    logits = evaluate()
    found = {"evaluation": _timed(evaluate, device, request)}
    found["training step"] = _timed(tasks.training_step(model, request), device, request)
    return found, logits


def _timed(call: Callable[[], Any], device: torch.device, request: dict[str, Any]) -> dict[str, float]:
    with tasks.peak_memory(device) as memory:
        seconds = tasks.timed(call, device, request)
    return {"seconds": statistics.median(seconds), **memory}


def main() -> None:
    """Measure each precision and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config/ms3/AVSegFormer_pvt2_ms3.py")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--precision", nargs="+", choices=("32", "tf32", "bf16"), default=["32", "bf16"])
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    common = {**vars(options), "weights": None, "threads": 0, "seconds": 1.0, "formulation": "ours"}
    results: dict[str, Any] = {}
    for precision in options.precision:
        results[precision] = measure({**common, "labelled": options.frames, "precision": precision})
        print(precision, json.dumps(results[precision], indent=1), flush=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
