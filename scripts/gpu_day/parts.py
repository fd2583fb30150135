"""What runs, in the order of its worth: commands of the project, on a GPU, or with small sizes on a CPU."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.gpu_day import tables
from utils.runtime import ROOT

FULL, SMALL = "config/ms3/MoDAT_pvt2_ms3.py", "config/ms3/MoDAT_pvt2_b0_ms3_stamps_scratch.py"
AVSEGFORMER = "config/ms3/AVSegFormer_pvt2_ms3.py"
STAMPS = "config/ms3/MoDAT_lite0_ms3_stamps.py"
STAMPS_62 = "config/ms3/MoDAT_best_ms3_stamps_62.py"

DRAWN = """
_base_ = {base!r}

stamps = dict(_delete_=True, tasks=["ms3"], out={data!r}, size={size}, kinds=4, clips={clips}, drawn=True, workers=1)
dataset = {{
    split: dict(
        anno_csv={data!r} + "/Multi-sources/ms3_meta_data.csv",
        dir_img={data!r} + "/Multi-sources/ms3_data/visual_frames",
        dir_audio_log_mel={data!r} + "/Multi-sources/ms3_data/audio_log_mel",
        dir_mask={data!r} + "/Multi-sources/ms3_data/gt_masks",
        img_size=({size}, {size}),
        batch_size=2,
    )
    for split in ("train", "val", "test")
}}
process = dict(train_epochs={epochs}, num_workers=0)
"""
"""A config with random weights on drawn data, which its first run makes."""


@dataclass(frozen=True)
class Part:
    """Commands that answer one question.

    Attributes:
        name: of its log and on the command line.
        title: in the report.
        share: of the whole time, beside the other parts' shares.
        commands: run in turn; those after a failed one too.
        summarise: Markdown of what the commands have left, None where they have left nothing.
        skipped: why the part cannot run here; empty where it can.
    """

    name: str
    title: str
    share: float
    commands: list[list[str]]
    summarise: Callable[[], str | None] = field(default=lambda: None)
    skipped: str = ""


def all_parts(out: Path, *, dry: bool, gpus: int) -> list[Part]:
    """The parts of a day on `gpus` GPUs; `dry`: the same with small sizes on a CPU."""
    results = out / "results"
    device = ["--device", "cpu" if dry else "cuda"]
    found = [
        Part(
            "kernels",
            "Kernels: build for this card, errors against the definition",
            4,
            [python("-m", "ops")],
            lambda: tables.end_of(out / "logs/kernels.log", 12),
        ),
        _tests(results, dry=dry),
        _op(results, device, dry=dry),
        *_steps(results, device, dry=dry),
        _classic(results, device, dry=dry),
        _memory(results, device, dry=dry),
        _processes(results, device, dry=dry, gpus=gpus),
        _nccl(out, results, device, dry=dry, gpus=gpus),
        *_stamps(out, dry=dry),
    ]
    return found


def python(*arguments: object) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *map(str, arguments)]


def _tests(results: Path, *, dry: bool) -> Part:
    cuda = [] if dry else ["tests/ops/test_cuda.py"]  # compiles, which takes minutes on a CPU
    chosen = {"gpu": ["-m", "gpu", "tests/ops" if dry else "tests"], "ops": [*cuda, "tests/ops/test_registration.py"]}
    return Part(
        "tests",
        "Tests that need a GPU, and tests of the operators",
        7,
        [
            python("-m", "pytest", *words, "-q", "-p", "no:cacheprovider", f"--junitxml={results / name}.xml")
            for name, words in chosen.items()
        ],
        lambda: tables.together(*(tables.tests(results / f"{name}.xml") for name in chosen)),
    )


def _op(results: Path, device: list[str], *, dry: bool) -> Part:
    target = results / "op.json"
    small = ["--levels", 8, 4, "--frames", 1, "--threads", 1, "--repeats", 1] if dry else []
    return Part(
        "op",
        "Deformable attention against its definition, AVSegFormer's classic op and the memory limit",
        5,
        [python("-m", "scripts.benchmark.ops", *device, *small, "--json", target)],
        lambda: tables.op(_read(target)),
    )


def _steps(results: Path, device: list[str], *, dry: bool) -> list[Part]:
    """Evaluation and training step per precision, so that a cut costs one of them."""
    parts = []
    for precision, share, title in (
        ("32", 5.0, "float32"),
        ("tf32", 4.0, "TF32"),
        ("bf16", 4.0, "bf16"),
        ("compiled", 8.0, "compiled, bf16"),
    ):
        target = results / f"step_{precision}.json"
        # TF32 is a mode of GPUs; and one dry part alone takes training steps, which are slow on a CPU.
        given = {"compiled": "bf16", "tf32": "32" if dry else "tf32"}.get(precision, precision)
        short = dry and precision != "32"
        small: list[object] = ["--config", SMALL, "--frames", 1 if short else 2, "--size", 64, "--quick"]
        arguments = [*(small if dry else ["--config", FULL]), "--precision", given, "--json", target]
        arguments += ["--sections", "model"] if short else ["--sections", "model", "training"]
        arguments += ["--compile"] if precision == "compiled" else []
        parts.append(
            Part(
                f"step-{precision}",
                f"Evaluation and training step, {title}, against the dense formulation",
                share,
                [python("-m", "scripts.benchmark.model", *device, *arguments)],
                lambda target=target: tables.model(_read(target)),  # type: ignore[misc]
            )
        )
    return parts


def _classic(results: Path, device: list[str], *, dry: bool) -> Part:
    target = results / "classic.json"
    small = (
        ["--config", SMALL, "--frames", 2, "--size", 64, "--repeats", 1, "--precision", 32]
        if dry
        else ["--config", AVSEGFORMER]
    )
    return Part(
        "classic",
        "Evaluation and training step with AVSegFormer's classic op",
        3,
        [python("-m", "scripts.gpu_day.classic", *device, *small, "--json", target)],
        lambda: tables.classic(_read(target)),
    )


def _memory(results: Path, device: list[str], *, dry: bool) -> Part:
    target = results / "memory.json"
    large = ["--frames", 10, "--size", 384, "--repeats", 2, "--precision", 32, "bf16"]
    small = ["--config", SMALL, "--frames", 2, "--size", 64, "--quick", "--precision", 32]
    sections = ["moe"] if dry else ["training", "moe"]
    return Part(
        "memory",
        "Memory and time of large clips, 10 frames of 384 pixels",
        6,
        [
            python(
                "-m", "scripts.benchmark.model", *device, *(small if dry else large),
                "--checkpointing", "--sections", *sections, "--json", target,
            )
        ],
        lambda: tables.model(_read(target)),
    )  # fmt: skip


def _processes(results: Path, device: list[str], *, dry: bool, gpus: int) -> Part:
    target = results / "gloo.json"
    small = ["--config", SMALL, "--size", 64] if dry else []
    return Part(
        "gloo",
        "Two processes on one card (gloo)",
        3,
        [python("-m", "scripts.gpu_day.processes", "--backend", "gloo", *device, *small, "--json", target)],
        lambda: tables.values(_read(target)),
    )


def _nccl(out: Path, results: Path, device: list[str], *, dry: bool, gpus: int) -> Part:
    target, backend, count = results / "nccl.json", "gloo" if dry else "nccl", 2 if dry else gpus
    small = ["--processes", count, *(["--config", SMALL, "--size", 64] if dry else [])]
    check = ["-m", "scripts.gpu_day.processes", "--backend", backend, *device, *small, "--json", target]
    clips = [8 * count, 4 * count, 4 * count]
    config = _drawn(out, "drawn_processes", size=64 if dry else 224, clips=clips, epochs=1)
    return Part(
        "nccl",
        "A process per card (NCCL): against one process, and a training run",
        4,
        [
            python(*check),
            ["bash", "train.sh", "ms3", str(config), f"process.devices={count}", f"process.work_dir={out / 'runs'}"],
        ],
        lambda: tables.together(tables.values(_read(target)), tables.run(out / "runs" / config.stem)),
        skipped="" if dry or gpus > 1 else "this machine has one card",
    )  # fmt: skip


def _stamps(out: Path, *, dry: bool) -> list[Part]:
    """Training runs whose scores are known from CPUs, each with its test."""
    parts = []
    for name, title, share, config in (
        ("stamps", "12 kinds of stamps (on CPUs: test mIoU 85.3)", 8.0, STAMPS),
        ("stamps-62", "62 kinds of stamps (on CPUs: test mIoU 79.8)", 14.0, STAMPS_62),
    ):
        given = config
        if dry:
            if name != "stamps":
                continue  # the same commands with another config
            given = str(_drawn(out, "drawn_stamps", size=64, clips=[4, 2, 2], epochs=1))
        run = out / "runs" / Path(given).stem
        work_dir = f"process.work_dir={out / 'runs'}"
        parts.append(
            Part(
                name,
                f"Training run: {title}",
                share,
                [
                    ["bash", "train.sh", "ms3", given, "process.devices=1", work_dir],
                    ["bash", "test.sh", "ms3", given, str(run / "MS3_best.pth"), "--robust", work_dir],
                ],
                lambda run=run: tables.run(run),  # type: ignore[misc]
            )
        )
    return parts


def _drawn(out: Path, name: str, *, size: int, clips: list[int], epochs: int) -> Path:
    """Write a config on drawn data; `out` is absolute."""
    path = out / "configs" / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = str(out / "data" / f"{name}_{size}")
    path.write_text(DRAWN.format(base=str(ROOT / SMALL), data=data, size=size, clips=clips, epochs=epochs))
    return path


def _read(path: Path) -> Any:
    """The contents of a JSON file; None where the command has not written it."""
    return json.loads(path.read_text()) if path.is_file() else None
