"""Small runs in real processes: drawn data, a tiny config, and the command line as a user types it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.data.stamps.drawn import paths

ROOT = Path(__file__).resolve().parents[1]
FRAMES = {"s4": 5, "ms3": 5, "avss": 10}

CONFIG = """
task = {task!r}
model = dict(
    type='MoDAT',
    backbone=dict(type={backbone!r}, weights=None),
    audio_encoder=dict(type='VGGish', channels=(4, 4, 8, 8), hidden_dim=16, frozen={freeze_audio}),
    embed_dim=32,
    num_frames={frames},
    head=dict(
        type='SegHead',
        num_classes={classes},
        num_queries=6,
        num_groups=8,
        mask_head=dict(type='MaskPredictor', hidden_dim=32, head_dims=(16, 8)),
        query_generator=dict(
            type='EncoderDecoderGenerator', num_layers=1, num_heads=4, ffn_dim=32,
            av_fusion=dict(type='AVFusion', ffn_dim=32),
        ),
        transformer=dict(
            type='Transformer',
            encoder=dict(num_layers=1, layer=dict(ffn_dim=32, num_heads=4, dropout={dropout})),
            decoder=dict(num_layers=1, layer=dict(ffn_dim=32, num_heads=4, dropout={dropout})),
        ),
        fusion_block=dict(
            type='DualAttentionMoE', num_heads=4, num_experts=2, dropout={dropout},
            second_policy_train={policy!r}, second_policy_eval='all',
        ),
    ),
)
dataset = {dataset}
optimizer = dict(lr=1e-3, eps={eps})
process = dict(
    num_workers={workers}, train_epochs=2, freeze_epochs={freeze_epochs}, work_dir={work_dir!r}, log_interval=1,
    check_data=False, {process}
)
"""


def make_data(
    folder: Path, clips: tuple[int, int, int] = (6, 3, 3), tasks: tuple[str, ...] = ("s4", "ms3", "avss")
) -> Path:
    """Drawn data of 64 pixels in all layouts."""
    command = [sys.executable, str(ROOT / "scripts/data/make_stamps.py"), "--drawn", "--out", str(folder)]
    command += ["--tasks", *tasks, "--clips", *map(str, clips), "--size", "64", "--kinds", "4", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def dataset_cfg(data: Path, task: str, **common: Any) -> dict[str, dict[str, Any]]:
    """The `dataset` section for drawn data; `common` goes into every split."""
    where = paths(data, task) | ({"crop_img_and_mask": False} if task == "avss" else {})
    return {split: {**where, **common, "split": split} for split in ("train", "val", "test")}


def write_config(
    path: Path,
    data: Path,
    task: str = "ms3",
    *,
    batch_size: int = 2,
    backbone: str = "pvt_v2_b0",
    dropout: float = 0.4,
    policy: str = "random",
    workers: int = 0,
    freeze_epochs: int = 1,
    freeze_audio: bool = True,
    eps: float = 1e-8,
    process: str = "",
) -> Path:
    """A config of a tiny model on drawn data; its runs are in `work_dir` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        CONFIG.format(
            task=task,
            backbone=backbone,
            freeze_audio=freeze_audio,
            frames=FRAMES[task],
            classes=71 if task == "avss" else 1,
            dropout=dropout,
            policy=policy,
            dataset=dataset_cfg(data, task, batch_size=batch_size, img_size=(64, 64)),
            workers=workers,
            freeze_epochs=freeze_epochs,
            eps=eps,
            work_dir=str(path.parent / "work_dir"),
            process=process,
        )
    )
    return path


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, without what pytest-xdist and launchers left in it."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "SLURM_", "TORCHELASTIC_"))
    }
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(key, None)
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def command(*arguments: object, script: str = "train.py") -> list[str]:
    """A Python entry point with arguments."""
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def start(
    *arguments: object, script: str = "train.py", folder: Path | None = None, **extra: str
) -> subprocess.Popen[str]:
    """Start an entry point in a process group of its own, from a folder."""
    return subprocess.Popen(
        command(*arguments, script=script),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**extra),
        cwd=folder,
        start_new_session=True,
    )


def finish(
    *arguments: object, script: str = "train.py", folder: Path | None = None, status: int | None = 0, **extra: str
) -> str:
    """Run an entry point to its end and return what it printed; `status` is what it has to exit with (None: any)."""
    process = start(*arguments, script=script, folder=folder, **extra)
    output, _ = process.communicate(timeout=600)
    assert status is None or process.returncode == status, f"status {process.returncode}:\n{output}"
    return output
