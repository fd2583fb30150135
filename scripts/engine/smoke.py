"""`train.sh --smoke`: a config's way through training, validation, checkpoint, resume and test, on drawn data.

Two epochs of one batch, so that both the frozen and the trained backbone of a schedule are seen; the second epoch is
then done again from the checkpoint of the first, and the weights of both are compared; test.py scores the best weights
as the validation did. Nothing is read but the config and the pretrained weights that are on disk; everything is written
into a temporary folder, which is removed.
"""

import contextlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from model.pretrained import resolve_weights
from ops import build
from ops.library import has_kernel
from scripts.data.stamps import drawn
from scripts.engine.fabric import accelerator, full_states, processes
from scripts.engine.folder import quiet_lightning, refuse_broken_data
from scripts.engine.loop import Batch, Losses
from scripts.engine.resume import LAST, PREVIOUS, find_resumable
from scripts.engine.run import Run
from scripts.engine.task_metrics import BEST_FILES
from utils.errors import ConfigError
from utils.registry import DATASETS
from utils.runtime import ROOT, StopRequested

PACKAGES = ("torch", "torchvision", "timm", "lightning", "mmengine", "numpy")
DRAWN_FRAMES = 5
"""Frames of a drawn clip of s4 or ms3."""
CPU_FRAMES = 2
"""Frames per clip, or single frames per batch, on a CPU, where full-size models would take longer than two minutes."""
OWN_FILES = ("dir_audio_wav", "cache_dir", "sound_labels", "num_labelled_frames", "label_idx_path")
"""Options of a split that are about its own files."""
BYTES_PER_PARAMETER = 24
"""Of all checkpoints together, weights and AdamW's two moments."""
SAME_SCORE = {"32": 1e-5, "bf16": 0.05, "16": 0.05}
"""Precision -> how far test.py's mIoU may be from the validation's: it rounds weights in low precisions."""
SAME_LOSS = 0.01
"""How far the loss of the repeated step may be, relative, on a GPU; on a CPU everything is equal bit for bit."""


@dataclass
class Seen:
    """What the smoke run found, line by line, and what is wrong."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        """Add a line."""
        self.lines.append((name, text))

    def check(self, name: str, right: bool, text: str, fault: str) -> None:
        """Add a line with a verdict."""
        self.lines.append((name, text if right else f"WRONG: {fault}"))
        if not right:
            self.faults.append(f"{name}: {fault}")


class TimedRun(Run):
    """A run that notes the seconds and the loss of each training step, and the seconds of each validation.

    Args:
        cfg: see Run.
        folder: see Run.
        found: see Run.
        saves: False writes no checkpoints and no weights: full-size ones are gigabytes.
    """

    def __init__(
        self, cfg: Any, folder: Path, found: tuple[Path, dict[str, Any]] | None = None, *, saves: bool = True
    ) -> None:
        super().__init__(cfg, folder, found)
        self.saves = saves
        if not saves:
            update = self.best.update
            self.best.update = lambda *found, write: update(*found, write=False)  # type: ignore[method-assign]
        self.steps: list[tuple[float, float]] = []
        self.validations: list[float] = []
        self._since = 0.0

    def _train_epoch(self, loader: DataLoader[Batch]) -> None:
        self._since = _now()
        super()._train_epoch(loader)

    def _after_batch(self, losses: Losses, *rest: Any, **named: Any) -> None:
        loss = float(losses["total"])
        self.steps.append((_now() - self._since, loss))
        super()._after_batch(losses, *rest, **named)
        self._since = _now()

    def _save(self) -> None:
        if self.saves:
            super()._save()

    def _finish_epoch(self, loader: DataLoader[Batch]) -> None:
        since = _now()
        super()._finish_epoch(loader)
        self.validations.append(_now() - since)


def smoke(cfg: Any, config: Path, console: Console | None = None) -> int:
    """Go through everything that a night's run does, and report.

    Args:
        cfg: from `utils.config.load_config`; it is changed.
        config: its file.
        console: for the report; default: stdout.

    Returns:
        0, or 1 where something is wrong; the report's last lines name it.

    Raises:
        ConfigError: several processes, or too little disk for the checkpoints.
        StopRequested: a signal; nothing is left behind.
        UserError: as in training.
    """
    console = console or Console(soft_wrap=True, highlight=False, markup=False)
    quiet_lightning()
    began, seen = time.perf_counter(), Seen()
    with _stoppable(), tempfile.TemporaryDirectory(prefix="modat-smoke-") as name:
        folder = Path(name)
        console.print(f"smoke: {config.name} on drawn data, in {folder}")
        machine(seen)
        shrink(cfg, folder, seen)
        refuse_broken_data(cfg)
        losses = _straight(cfg, folder, seen, console)
        _resumed(cfg, folder, losses, seen, console)
        _tested(cfg, config, folder, seen, console)
    seen.add("seconds in all", f"{time.perf_counter() - began:.0f}")
    table = Table(title=f"smoke run of {config.name}", title_justify="left", show_header=False)
    for line in seen.lines:
        table.add_row(*line)
    console.print(table)
    for fault in seen.faults:
        console.print(f"WRONG: {fault}")
    console.print("wrong: see above" if seen.faults else "all is well: this machine trains and tests this config")
    return 1 if seen.faults else 0


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM end the block as an exception, so that the temporary folder is removed; nothing is left to resume."""

    def stop(number: int, _: object) -> None:
        raise StopRequested(number, None)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except StopRequested as error:
        raise StopRequested(error.signal_number, None) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def machine(seen: Seen) -> None:
    """Versions, device and op backend."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    seen.add("versions", f"Python {platform.python_version()}, {versions}")
    kind = "cuda" if accelerator() == "gpu" else "cpu"
    if kind == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        device = f"{torch.cuda.get_device_name()}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
        if torch.cuda.device_count() > 1:
            device += f"; the first of {torch.cuda.device_count()} GPUs: their exchange is not tried"
    else:
        threads = torch.get_num_threads()
        device = f"CPU, {threads} thread{'s' if threads > 1 else ''} on {len(os.sched_getaffinity(0))} CPUs"
    seen.add("device", device)
    if has_kernel(kind):
        backend = "compiled kernel" + (f", {torch.ops.modat.cpu_capability()}" if kind == "cpu" else "")
    else:
        backend = f"PyTorch definition, slower: {build.load('cpu' if kind == 'cpu' else 'cuda').reason}"
    seen.add("deformable attention", backend)


def shrink(cfg: Any, folder: Path, seen: Seen) -> None:
    """Give a config drawn data, two epochs of one batch, and the weights that are on disk; all else remains.

    Raises:
        ConfigError: several processes are asked for by the launcher.
    """
    process, train = cfg.process, cfg.dataset["train"]
    process.update(devices=1, num_nodes=1, strategy="auto" if process.strategy == "ddp" else process.strategy)
    if math.prod(processes(process, accelerator())) > 1:
        raise ConfigError("--smoke runs in one process: start it without torchrun, and under SLURM with one task.")
    process.update(
        freeze_epochs=min(process.freeze_epochs, 1) if process.freeze_epochs < process.train_epochs else 2,
        train_epochs=2,
        start_eval_epoch=1,
        eval_interval=1,
        checkpoint_interval=0,
        log_interval=1,
        drop_last=False,
        num_workers=min(process.num_workers, 2),
        work_dir=str(folder / "runs"),
    )
    single, wanted = bool(train.get("single_frames", False)), int(train.get("batch_size", 1))
    mixes = bool(train.get("negatives") or train.get("augment"))  # may need the sound of another clip
    if accelerator() == "gpu":
        batch = wanted
    elif single:
        batch = min(wanted, 2 * CPU_FRAMES if mixes else CPU_FRAMES)
    else:
        batch = min(wanted, 2 if mixes else 1)
    size = max(_image_size(cfg, split) for split in ("train", "val", "test"))
    drawn.draw(folder / "data", [cfg.task], clips=(_clips(cfg.task, batch, single), 1, 1), size=size)
    frames, given = _read_drawn(cfg, folder / "data")
    train = cfg.dataset["train"]
    train["batch_size"] = batch
    cfg.pop("stamps", None)
    unit = ("frame" if single else "clip") + ("s" if batch > 1 else "")
    seen.add("batch", f"{batch} {unit} of {size} pixels" + (f" (the config's: {wanted})" if batch != wanted else ""))
    seen.add("frames per clip", f"{frames}" + (f" (the config's: {given})" if frames != given else ""))
    missing = list(without_missing(cfg.model))
    seen.add("pretrained weights", f"random for want of {', '.join(missing)}" if missing else "as the config says")


def without_missing(model: Any) -> Iterator[str]:
    """Take weights out of `config.model` that are not on disk; gives their names."""
    for part, key in (("backbone", "weights"), ("audio_encoder", "weights"), ("audio_encoder", "pca_weights")):
        options = model.get(part) or {}
        value = options.get(key)
        if value is None or (value not in ("timm", "transformers") and resolve_weights(value).is_file()):
            continue
        options[key] = None
        if key == "pca_weights":
            options["pca"] = False
        yield f"{part}.{key}={value}"


def _read_drawn(cfg: Any, data: Path) -> tuple[int, int]:
    """Let a config read drawn data instead of its own, of whatever type, with the options that both have.

    Returns:
        Frames per clip, now and before.
    """
    given = int(cfg.model.get("num_frames", DRAWN_FRAMES))
    frames = min(given, DRAWN_FRAMES) if cfg.task != "avss" else given
    if accelerator() == "cpu":
        frames = min(frames, CPU_FRAMES)
    cfg.model["num_frames"] = frames
    fields = drawn.paths(data, cfg.task)
    known = inspect.signature(DATASETS.get(fields["type"]).__init__).parameters
    for split, options in cfg.dataset.items():
        kept = {key: value for key, value in options.items() if key in known and key not in OWN_FILES}
        cfg.dataset[split] = ConfigDict({**kept, **fields, "num_frames": frames})
    if cfg.task != "avss":
        return frames, given
    classes = cfg.dataset["train"].setdefault("num_classes", 71)
    if classes <= drawn.KINDS:
        raise ConfigError(f"--smoke draws {drawn.KINDS} kinds, and dataset.train.num_classes={classes} has no room.")
    drawn.write_classes(data, classes)
    return frames, given


def _clips(task: str, batch: int, single_frames: bool) -> int:
    """Training clips that give one batch; single frames of ms3 come several to a clip."""
    if not single_frames:
        return batch
    frames = DRAWN_FRAMES if accelerator() == "gpu" else CPU_FRAMES
    return math.ceil(batch / frames) if task == "ms3" else batch


def _image_size(cfg: Any, split: str) -> int:
    options: Mapping[str, Any] = cfg.dataset[split]
    if cfg.task == "avss" and options.get("crop_img_and_mask", True):
        return int(options.get("crop_size", 224))
    return max(map(int, options.get("img_size", (224, 224))))


def _straight(cfg: Any, folder: Path, seen: Seen, console: Console) -> list[float]:
    """Train both epochs without a break; gives the losses of the steps."""
    run = TimedRun(cfg, folder / "runs" / "straight")
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    free = shutil.disk_usage(folder).free
    if free < BYTES_PER_PARAMETER * parameters:
        raise ConfigError(
            f"the smoke run's checkpoints need {BYTES_PER_PARAMETER * parameters / 1e9:.1f} GB, and {folder.parent} "
            f"has {free / 1e9:.1f}: name a folder with room, TMPDIR=FOLDER bash train.sh ..."
        )
    seen.add("model", f"{parameters / 1e6:.1f} M parameters, precision {run.process.precision}")
    console.print("training, validation, checkpoints")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run.fit(Console(quiet=True), title="smoke")
    steps = ", ".join(f"{seconds:.2f}" for seconds, _ in run.steps)
    frozen = f" (backbone frozen for the first {run.process.freeze_epochs})" if run.process.freeze_epochs else ""
    seen.add("seconds per step", f"{steps}{frozen}")
    seen.add("validation and checkpoint", f"{run.validations[-1]:.2f} s, mIoU {_miou(run):.4f}")
    losses = [loss for _, loss in run.steps]
    seen.check(
        "losses", all(map(math.isfinite, losses)), ", ".join(f"{x:.4f}" for x in losses), f"not finite: {losses}"
    )
    seen.add("peak memory", _peak())
    seen.add("checkpoint", f"{(run.folder / LAST).stat().st_size / 1e6:.0f} MB")
    return losses


def _resumed(cfg: Any, folder: Path, losses: list[float], seen: Seen, console: Console) -> None:
    """Train the second epoch again, from the checkpoint of the first, and compare with the uninterrupted run's end."""
    console.print("resume")
    straight, target = folder / "runs" / "straight", folder / "runs" / "resumed"
    target.mkdir()
    (straight / PREVIOUS).rename(target / LAST)
    run = TimedRun(cfg, target, find_resumable(target, console.print), saves=False)
    run.fit(Console(quiet=True), title="smoke")
    weights, optimizer = full_states(run.fabric, run.wrapped, run.optimizer)
    expected = torch.load(straight / LAST, map_location="cpu", weights_only=True, mmap=True)
    same = (
        _equal(expected["state_dict"], weights)
        and _equal(expected["optimizer"], optimizer)
        and expected["best"] == run.best.best
    )
    if accelerator() == "cpu":
        seen.check(
            "resume",
            same,
            "equal to the uninterrupted run, bit for bit",
            "weights, optimizer or scores differ from the uninterrupted run's",
        )
        return
    first, again = losses[-1], run.steps[-1][1]
    begun = torch.load(target / LAST, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    step = max(_distance(expected["state_dict"], begun), 1e-30)
    difference = _distance(expected["state_dict"], weights) / step
    seen.check(
        "resume",
        abs(first - again) <= SAME_LOSS * abs(first),
        "equal to the uninterrupted run, bit for bit"
        if same
        else f"loss {again:.6f} after {first:.6f}; weights differ by {difference:.1e} of the step (order of GPU sums)",
        f"the repeated step has the loss {again:.6f}, and had {first:.6f}",
    )


def _tested(cfg: Any, config: Path, folder: Path, seen: Seen, console: Console) -> None:
    """Score the best weights by test.py, in a process of its own, on the split that the validation has scored."""
    console.print("test")
    run = folder / "runs" / "straight"
    weights = run / next(iter(BEST_FILES[cfg.task]))
    written = folder / f"{config.stem}.py"
    written.write_text(cfg.pretty_text)
    command = [sys.executable, str(ROOT / "test.py"), cfg.task, str(written), str(weights), "--split", "val"]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    scores = folder / "runs" / config.stem / "val_metrics.json"
    if done.returncode or not scores.is_file():
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        seen.check("test", False, "", lines[-1] if lines else f"test.py ended with status {done.returncode}")
        return
    found = float(json.loads(scores.read_text())["miou"])
    last = torch.load(run / LAST, map_location="cpu", weights_only=True, mmap=True)
    expected = float(last["best"][weights.name]["score"])
    seen.check(
        "test",
        abs(found - expected) <= SAME_SCORE[cfg.process.precision],
        f"test.sh gives the validation's mIoU, {found:.4f}, in {seconds:.1f} s",
        f"test.sh gives the mIoU {found:.4f}, and the validation gave {expected:.4f}",
    )


def _miou(run: Run) -> float:
    return float(next(iter(run.best.best.values()))["score"])


def _peak() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of the process"


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _equal(one: Any, other: Any) -> bool:
    """Whether two structures of tensors are the same."""
    if isinstance(one, Tensor):
        return bool(torch.equal(one, other.cpu()))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Euclidean distance of two sets of weights."""
    return math.sqrt(sum(float((one[key].double() - other[key].cpu().double()).square().sum()) for key in one))
