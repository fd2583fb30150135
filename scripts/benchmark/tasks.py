"""A single measurement of model.py, run in a separate process with its own allocator settings and peak memory.

    python -m scripts.benchmark.tasks '{"task": "rate", "precision": "32", "device": "cpu"}'

takes a request as JSON and prints the result as the last line of its output, also JSON. Modules needed by one task only
are imported in it, to keep them out of the peak memory of the others.
"""

import contextlib
import ctypes
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import build_model
from model.checkpoint import load_weights
from model.criterion import build_criterion
from model.precision import AUTOCAST, round_weights
from model.reference import dense_published, relative_error
from utils.config import load_config

Request = Mapping[str, Any]
Result = dict[str, Any]
TASKS: dict[str, Callable[[Request], Result]] = {}
SEED = 0


def task(function: Callable[[Request], Result]) -> Callable[[Request], Result]:
    """Register a function under its name."""
    TASKS[function.__name__] = function
    return function


@task
def rate(request: Request) -> Result:
    """Products of square matrices: the highest rate in FLOP/s (a multiply-add counts as two)."""
    device = torch.device(request["device"])
    best = 0.0
    for size in request["sizes"]:
        a, b = (torch.randn(size, size, device=device) for _ in range(2))
        if request["precision"] in AUTOCAST:
            a, b = (x.to(AUTOCAST[request["precision"]]) for x in (a, b))
        with precision("32" if request["precision"] in AUTOCAST else request["precision"], device):
            seconds = timed(partial(torch.matmul, a, b), device, request)
        best = max(best, 2 * size**3 / min(seconds))
    return {"flops_per_second": best}


@task
def flops(request: Request) -> Result:
    """FLOPs of a clip in matrix products and convolutions: in evaluation, also per box, and in a training step.

    Attention is counted in its plain form. Other operations (deformable sampling, normalisation, softmax) are not
    counted, so the resulting limit is a lower bound.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = prepare(request)
    per_box: dict[str, float] = {}
    with sdpa_kernel(SDPBackend.MATH):
        if request["training"]:
            step = training_step(model, request)
            mapping = {torch.ops.aten.convolution_backward: convolution_backward_flops}
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                step()
        else:
            sample = batch(request)
            with (
                torch.no_grad(),
                FlopCounterMode(display=False) as counter,
                watch(model, counter.get_total_flops, per_box),
            ):
                model(*sample)
    return {"total": counter.get_total_flops(), "boxes": per_box}


def convolution_backward_flops(
    gradient_shape: list[int],
    input_shape: list[int],
    weight_shape: list[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    wanted: list[bool],
    **_: Any,
) -> int:
    """FLOPs of the forward pass once per gradient (input, weight); the formula in PyTorch ignores groups."""
    from torch.utils.flop_counter import conv_flop_count

    return conv_flop_count(input_shape, weight_shape, gradient_shape, transposed) * sum(wanted[:2])


@task
def check(request: Request) -> Result:
    """Relative errors between the model and the dense formulation on the same weights and inputs."""
    model = prepare(request)
    sample = batch(request)
    with torch.no_grad(), precision("32", torch.device(request["device"])):
        found = model(*sample)
        expected = dense_published(model)(*sample)
    compared = ("logits", "mask_feature", "aux_loss")
    return {name: relative_error(getattr(found, name), getattr(expected, name)) for name in compared}


@task
def agreement(request: Request) -> Result:
    """Agreement of masks with those of float32: IoU of objects (K = 1), or the share of pixels of the same class."""
    from scripts.engine.visualize import predicted_classes

    model = prepare(request)
    sample = batch(request)
    device = torch.device(request["device"])
    with torch.inference_mode():
        with precision("32", device):
            expected = predicted_classes(model(*sample).logits)
        with precision(request["precision"], device):
            found = predicted_classes(model(*sample).logits)
    same = (found == expected) if num_classes(model) > 1 else (found & expected).bool()
    union = torch.ones_like(same) if num_classes(model) > 1 else (found | expected).bool()
    return {
        "agreement": float(same.sum() / union.sum().clamp(min=1)),
        "object_share": float((expected > 0).float().mean()),
    }


@task
def evaluate(request: Request) -> Result:
    """Evaluation of a clip: seconds, peak memory, and seconds per box of the figure."""
    device = torch.device(request["device"])
    model = prepare(request)
    if request["formulation"] == "ours" and request["precision"] in AUTOCAST:
        round_weights(model, AUTOCAST[request["precision"]])  # as scripts.engine.testing.ModelPredictor
    model = formulation(model, request)
    sample = batch(request)

    @torch.inference_mode()
    def run() -> None:
        with precision(request["precision"], device):
            model(*sample)

    with peak_memory(device) as memory:
        seconds = timed(run, device, request)
    result: Result = {"seconds": seconds, **memory}
    if not request.get("compile"):  # the compiled graph does not call the modules
        times: list[dict[str, float]] = []
        for _ in range(max(1, request["repeats"] // 2)):
            times.append({})
            with watch(model, lambda: synchronised_clock(device), times[-1]):
                run()
        result["boxes"] = {name: statistics.median(t[name] for t in times) for name in times[0]}
    return result


@task
def train(request: Request) -> Result:
    """A training step (forward, loss, backward, AdamW) on a clip: seconds, peak memory.

    The first `labelled` frames have a label; the published formulation predicts masks for all frames.
    """
    device = torch.device(request["device"])
    model = prepare(request)
    model.set_activation_checkpointing(bool(request.get("checkpointing")))
    model = formulation(model, request)
    step = training_step(model, request)
    with peak_memory(device) as memory:
        seconds = timed(step, device, request)
    return {"seconds": seconds, **memory}


@task
def fusion(request: Request) -> Result:
    """The fusion box alone at an image size: forward, and forward with backward; seconds and extra memory."""
    device = torch.device(request["device"])
    model = prepare(request)
    box = formulation(model, request).head.fusion_block
    if box is None:
        return {}
    channels = model.audio_proj.out_features
    generator = torch.Generator().manual_seed(SEED)
    feature, audio = (
        torch.randn(request["frames"], *shape, generator=generator).to(device)
        for shape in ((channels, request["size"] // 4, request["size"] // 4), (3, channels))
    )
    del model
    gc.collect()

    def forward() -> None:
        with torch.inference_mode(), precision(request["precision"], device):
            box(feature, audio)

    leaf = feature.clone().requires_grad_()

    def forward_backward() -> None:
        with precision(request["precision"], device):
            out, aux_loss = box(leaf, audio)
        (out.float().mean() + aux_loss).backward()
        box.zero_grad(set_to_none=True)

    result: Result = {"tokens": feature.shape[-1] ** 2}
    for name, run in (("forward", forward), ("forward_backward", forward_backward))[
        : 1 if request["forward_only"] else 2
    ]:
        box.train(name == "forward_backward")
        with peak_memory(device) as memory:
            seconds = timed(run, device, request)
        result[name] = {"seconds": seconds, **memory}
    return result


@task
def metrics(request: Request) -> Result:
    """Metrics and decoding of AVSS labels, against their literal definitions on the same input."""
    from dataloader.palette import decode, encode
    from scripts.benchmark.literal_metrics import (
        literal_decode,
        literal_f_score,
        literal_mask_iou,
        literal_semantic_sums,
    )
    from utils.metrics import FScore, MaskIoU, SemanticScores

    size = request["size"]
    cpu = torch.device("cpu")
    device = torch.device(request["device"])
    generator = torch.Generator().manual_seed(SEED)
    frames, classes = 10, 71
    logits = (2 * torch.randn(frames, 1, size, size, generator=generator)).to(device)
    target = (torch.rand(frames, size, size, generator=generator) > 0.7).to(device, torch.uint8)
    semantic_logits = torch.randn(frames, classes, size, size, generator=generator).to(device)
    labels = torch.randint(0, classes, (frames, size, size), generator=generator, dtype=torch.uint8)
    colours = encode(labels[0].numpy())
    labels = labels.to(device)

    def updated(metric: Any, x: Tensor, y: Tensor) -> Any:
        metric.to(device).update(x, y)
        return metric

    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any], int, bool]] = {
        "F-score": (
            lambda: updated(FScore(), logits, target),
            lambda: literal_f_score(logits[:1], target[:1]),
            1,
            abs(
                float(updated(FScore(), logits[:1], target[:1]).compute()["f_score"])
                - float(literal_f_score(logits[:1], target[:1]))
            )
            < 1e-6,
        ),
        "mIoU": (
            lambda: updated(MaskIoU(), logits, target),
            lambda: literal_mask_iou(logits, target),
            frames,
            abs(float(updated(MaskIoU(), logits, target).compute()) - float(literal_mask_iou(logits, target))) < 1e-6,
        ),
        "71 classes": (
            lambda: updated(SemanticScores(classes), semantic_logits, labels),
            lambda: literal_semantic_sums(semantic_logits[:1], labels[:1]),
            1,
            torch.allclose(
                updated(SemanticScores(classes), semantic_logits[:1], labels[:1]).iou_sum.cpu(),
                literal_semantic_sums(semantic_logits[:1], labels[:1])[0],
            ),
        ),
    }
    result: Result = {}
    for name, (ours, literal, literal_frames, equal) in pairs.items():
        result[name] = {
            "ours_frames_per_second": frames / statistics.median(timed(ours, device, request)),
            "literal_frames_per_second": literal_frames / statistics.median(timed(literal, device, request)),
            "equal": bool(equal),
        }
    result["AVSS label"] = {
        "ours_frames_per_second": 1 / statistics.median(timed(lambda: decode(colours), cpu, request)),
        "literal_frames_per_second": 1 / statistics.median(timed(lambda: literal_decode(colours), cpu, request)),
        "equal": bool(np.array_equal(decode(colours), literal_decode(colours))),
    }
    return result


@task
def loading(request: Request) -> Result:
    """Clips per second from disk, on drawn clips in the ms3 layout: the first pass (computing log-mels) and later."""
    from dataloader import build_dataset
    from scripts.data.make_stamps import Settings, make_stamps

    clips = 8
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(clips=(clips, 2, 2), size=request["size"], kinds=6, seed=SEED, drawn=True)
        with contextlib.redirect_stdout(sys.stderr):
            make_stamps(Path(folder), ["ms3"], settings, workers=1, quiet=True)
        data = Path(folder) / "Multi-sources" / "ms3_data"
        dataset = build_dataset(
            {
                "type": "MS3Dataset",
                "split": "train",
                "anno_csv": str(data.parent / "ms3_meta_data.csv"),
                "dir_img": str(data / "visual_frames"),
                "dir_audio_log_mel": str(data / "audio_log_mel"),
                "dir_mask": str(data / "gt_masks"),
                "img_size": (request["size"], request["size"]),
                "batch_size": 1,
            }
        )

        def read() -> float:
            start = time.perf_counter()
            for index in range(clips):
                dataset[index]
            return clips / (time.perf_counter() - start)

        first = read()
        return {
            "first_pass": first,
            "later_passes": statistics.median(read() for _ in range(max(2, request["repeats"]))),
        }


def prepare(request: Request) -> Any:
    """The config's model on the device in evaluation mode, with the weights file or seeded random weights."""
    torch.manual_seed(SEED)
    torch.set_num_threads(request["threads"] or torch.get_num_threads())
    model = build_model(load_config(request["config"]).model)
    if request["weights"]:
        load_weights(model, request["weights"])
    return model.to(request["device"]).eval()


def formulation(model: Any, request: Request) -> Any:
    """The model in the requested formulation, 'ours' or 'published', optionally compiled."""
    if request["formulation"] == "published":
        return dense_published(model)
    if request.get("compile"):
        return torch.compile(model)
    return model


def num_classes(model: Any) -> int:
    """K of a model in either formulation."""
    mask_head = getattr(model, "_orig_mod", model).head.mask_head
    return int(getattr(mask_head, "original", mask_head).classify.out_channels)


def batch(request: Request) -> tuple[Tensor, Tensor]:
    """Seeded log-mels (N, 1, 96, 64) and frames (N, 3, H, W)."""
    generator = torch.Generator().manual_seed(SEED)
    n, size = request["frames"], request["size"]
    coarse = torch.randn(n, 3, 16, 16, generator=generator)
    images = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    images += 0.1 * torch.randn(n, 3, size, size, generator=generator)
    log_mel = torch.randn(n, 1, 96, 64, generator=generator)
    return log_mel.to(request["device"]), images.to(request["device"])


def training_step(model: Any, request: Request) -> Callable[[], None]:
    """A function that runs one step: forward, loss over the labelled frames, backward, AdamW."""
    device = torch.device(request["device"])
    classes = num_classes(model)
    criterion = build_criterion({}, classes).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=1e-6,
        weight_decay=0.01,
        fused=request["formulation"] == "ours" and request["precision"] != "16",  # as in scripts/engine/run.py
    )
    scaler = torch.amp.GradScaler(device.type, enabled=request["precision"] == "16")
    sample = batch(request)
    frames, labelled = request["frames"], request["labelled"]
    generator = torch.Generator().manual_seed(SEED)
    shape = (frames, request["size"], request["size"])
    masks = torch.randint(0, max(2, classes), shape, generator=generator, dtype=torch.uint8).to(device)
    flag = (torch.arange(frames) < labelled).float().to(device)
    frame_indices = None
    if labelled < frames and request["formulation"] == "ours":  # as in scripts/engine/loop.py
        frame_indices = torch.arange(labelled, device=device)
        masks, flag = masks[frame_indices], flag[frame_indices]
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision(request["precision"], device):
            out = model(*sample, frame_indices=frame_indices)
        loss = criterion(out, masks, flag)["total"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


@contextlib.contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """'32' (float32 throughout), 'tf32' (CUDA only), or autocast to 'bf16' or '16'."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    if name in AUTOCAST:
        with torch.autocast(device.type, AUTOCAST[name]):
            yield
    else:
        yield


def boxes(model: Any) -> dict[str, Iterable[nn.Module]]:
    """The boxes of the figure, in the order of the data flow."""
    head = model.head
    parts: dict[str, Iterable[nn.Module]] = {
        "backbone": [model.backbone],
        "audio encoder": [model.audio_encoder],
        "A-V fusion, queries": [head.query_generator],
        "encoder": [head.transformer.encoder],
        "decoder": [head.transformer.decoder],
        "mask feature": [*head.in_proj, head.pixel_decoder],
        "fusion (MoE)": [head.fusion_block],
        "mask head": [head.mask_head],
    }
    return {name: modules for name, modules in parts.items() if list(modules) != [None]}


@contextlib.contextmanager
def watch(model: Any, meter: Callable[[], float], readings: dict[str, float]) -> Iterator[None]:
    """Add to `readings` the increase of the meter while each box runs, and under 'all' while the model runs."""
    handles = []
    for name, modules in {**boxes(model), "all": [model]}.items():
        readings[name] = 0.0
        for module in modules:
            started: list[float] = []

            def before(_m: nn.Module, _i: Any, started: list[float] = started) -> None:
                started.append(meter())

            def after(_m: nn.Module, _i: Any, _o: Any, name: str = name, started: list[float] = started) -> None:
                readings[name] += meter() - started.pop()

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def synchronised_clock(device: torch.device) -> float:
    """Seconds, after synchronising the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(run: Callable[[], Any], device: torch.device, request: Request) -> list[float]:
    """Seconds of each run after a warm-up, on a GPU between CUDA events.

    At least `repeats` runs, and up to ten times as many until `seconds` have passed.
    """
    for _ in range(3 if device.type == "cuda" else 1):
        run()
    seconds: list[float] = []
    least, enough = request["repeats"], request["seconds"]
    while len(seconds) < least or (sum(seconds) < enough and len(seconds) < 10 * least):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
    return seconds


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Peak memory of the block in MB (10^6 bytes): resident memory of the process on a CPU, tensors on a GPU.

    `peak_mb` is the total, weights included; `extra_mb` the increase over the start of the block.
    """
    result: dict[str, float] = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield result
        peak = torch.cuda.max_memory_allocated()
    else:
        with contextlib.suppress(OSError, AttributeError):  # leave out memory freed before the block
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        yield result
        peak = _status("VmHWM")
    result |= {"peak_mb": peak / 1e6, "extra_mb": (peak - before) / 1e6}


def _status(key: str) -> int:
    """A number of bytes from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def main() -> None:
    """Run the request on the command line."""
    request = json.loads(sys.argv[1])
    result = TASKS[request["task"]](request)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
