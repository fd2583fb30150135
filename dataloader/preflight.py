"""Preflight: read every file of every clip once, and report faults before training."""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from dataloader.base import AudioVisualDataset, Clip, stored_log_mel
from dataloader.images import open_image
from dataloader.tables import Row, inside
from utils.errors import DataError
from utils.files import atomic_path
from utils.registry import DATASETS, build

SPLITS = ("train", "val", "test")
KINDS = ("table", "frames", "masks", "sound", "splits")
_ASPECT_TOLERANCE = 0.03
_CHECK_VERSION = "1"


@dataclass(frozen=True)
class Fault:
    """One fault: its split, its clip, its kind (one of `KINDS`), a sentence, and the line of the table."""

    split: str
    clip: str
    kind: str
    message: str
    row: Row | None = None

    def __str__(self) -> str:
        """The fault's line of the report."""
        clip = "/".join(part for part in (self.split, self.clip) if part)
        line = f" ({self.row.location})" if self.row is not None and self.row.location not in self.message else ""
        return f"{clip}: {self.message}{line}"


@dataclass
class Report:
    """Clips and faults that a check found."""

    task: str
    clips: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there are no faults."""
        return not self.faults

    def table(self) -> Table:
        """Clips and faults per split, for a rich console."""
        table = Table(title=f"data of {self.task}")
        for heading in ("split", "clips", "bad clips", *KINDS):
            table.add_column(heading, justify="left" if heading == "split" else "right")
        for split, clips in self.clips.items():
            found = [fault for fault in self.faults if fault.split == split]
            bad = len({fault.clip for fault in found if fault.clip})
            kinds = Counter(fault.kind for fault in found)
            table.add_row(split, str(clips), str(bad), *(str(kinds[kind]) for kind in KINDS))
        return table


def check_data(
    cfg: Mapping[str, Any], *, workers: int | None = None, progress: bool = True, remember: bool = True
) -> Report:
    """Check all files of all splits of a config.

    Args:
        cfg: a loaded config.
        workers: number of processes; None = `process.num_workers`.
        progress: show a bar on the terminal.
        remember: skip clips that passed an earlier check and whose files have not changed since.

    Returns:
        The report. Log-mels computed by the check are cached.

    Raises:
        ConfigError: the config's data sets cannot be built.
    """
    report = Report(task=str(cfg.get("task", "") or ""))
    datasets: dict[str, AudioVisualDataset] = {}
    for split in SPLITS:
        if split not in cfg["dataset"]:
            continue
        report.clips[split] = 0
        try:
            datasets[split] = build(DATASETS, cfg["dataset"][split], where=f"dataset.{split}")
        except DataError as error:
            report.faults.append(Fault(split, "", "table", str(error)))
            continue
        report.clips[split] = len(datasets[split])
        report.task = report.task or datasets[split].task
    report.faults += _repeated(datasets)
    memory = _Memory(datasets.values()) if remember else None
    checks = _Checks(datasets, memory.good if memory else frozenset())
    count = int(cfg.get("process", {}).get("num_workers", 0)) if workers is None else workers
    loader: DataLoader[Any] = DataLoader(checks, batch_size=None, num_workers=min(count, len(checks)), collate_fn=_same)
    columns = (TextColumn("checking data"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress, transient=True) as bar:
        for faults, fingerprint in bar.track(loader, total=len(checks)):
            report.faults += faults
            if memory and not faults:
                memory.seen.add(fingerprint)
    if memory:
        memory.save()
    return report


def write_clean_tables(report: Report, tables: Iterable[Path]) -> dict[Path, list[int]]:
    """Write a copy of each table without the lines of faulty clips, `NAME.clean.csv` beside it.

    Returns:
        New file -> numbers of the lines left out.

    Raises:
        DataError: a table cannot be read, or its folder cannot be written.
    """
    written = {}
    for path in sorted(set(tables)):
        bad = {fault.row.line for fault in report.faults if fault.row is not None and fault.row.table == path}
        target = path.with_name(f"{path.stem}.clean.csv")
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.reader(file)
                kept = [row for row in reader if row and reader.line_num not in bad]
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(kept)
            _write_atomically(target, text.getvalue())
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{target} cannot be written ({error}).") from error
        written[target] = sorted(bad)
    return written


class _Checks(Dataset[tuple[list[Fault], str]]):
    """All clips of all splits; an item is the faults and the fingerprint of a clip."""

    def __init__(self, datasets: Mapping[str, AudioVisualDataset], good: frozenset[str]) -> None:
        self.datasets = datasets
        self.good = good
        self.items = [(split, index) for split, dataset in datasets.items() for index in range(len(dataset))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> tuple[list[Fault], str]:
        split, index = self.items[number]
        dataset = self.datasets[split]
        clip = dataset.clips[index]
        try:
            dataset.materialise(clip)
        except DataError as error:
            return [Fault(split, clip.name, "frames", str(error), clip.row)], ""
        fingerprint = _fingerprint(dataset, clip)
        if fingerprint in self.good:
            return [], fingerprint
        return list(check_clip(dataset, clip, split)), fingerprint


def check_clip(dataset: AudioVisualDataset, clip: Clip, split: str) -> Iterator[Fault]:
    """All faults of the files of one clip."""
    roots = dataset.roots()

    def attempt(kind: str, work: Callable[[], Any]) -> tuple[Any, list[Fault]]:
        try:
            return work(), []
        except DataError as error:
            return None, [Fault(split, clip.name, kind, str(error), clip.row)]

    _, faults = attempt("frames", lambda: dataset.materialise(clip))
    if faults:
        yield from faults
        return
    sizes: dict[str, list[tuple[int, int] | None]] = {"frames": [], "masks": []}
    for kind, paths in (("frames", clip.frames), ("masks", clip.masks)):
        folder = paths[0].parent
        if not folder.is_dir():
            message = f"the folder {folder} is missing, but the table lists the clip."
            yield Fault(split, clip.name, kind, message, clip.row)
            continue
        for path in paths:

            def read(path: Path = path, kind: str = kind) -> tuple[int, int]:
                size = open_image(inside(roots[kind], path, clip.row.location), kind.removesuffix("s")).size
                if kind == "masks":
                    dataset.read_mask(path)
                return size

            size, faults = attempt(kind, read)
            sizes[kind].append(size)
            yield from faults
        different = {size for size in sizes[kind] if size is not None}
        if len(different) > 1:
            seen = ", ".join(sorted(f"{width} x {height}" for width, height in different))
            yield Fault(split, clip.name, kind, f"the {kind} in {folder} have different sizes: {seen}.", clip.row)
            sizes[kind] = []
    for path, frame, mask in zip(clip.masks, sizes["frames"], sizes["masks"], strict=False):
        if frame and mask and abs(frame[0] * mask[1] / (frame[1] * mask[0]) - 1) > _ASPECT_TOLERANCE:
            shapes = f"{mask[0]} x {mask[1]} pixels and its frame {frame[0]} x {frame[1]}"
            message = f"the mask {path} has {shapes}, which is another aspect ratio."
            yield Fault(split, clip.name, "masks", message, clip.row)
            break
    _, faults = attempt("sound", lambda: dataset.read_log_mel(clip))
    yield from faults


def _repeated(datasets: Mapping[str, AudioVisualDataset]) -> list[Fault]:
    """Clips listed twice in a split, or in two splits, where training would see clips of the evaluation."""
    faults = []
    home: dict[str, tuple[str, Row]] = {}
    # Evaluation first: of a clip in two splits, the line of training is the fault.
    for split in sorted(datasets, key=("test", "val", "train").index):
        for clip in datasets[split].clips:
            if clip.name not in home:
                home[clip.name] = (split, clip.row)
                continue
            other, row = home[clip.name]
            repeated = (
                f"is listed twice in the split {split}" if other == split else f"is in the splits {other} and {split}"
            )
            message = f"the clip {clip.name} {repeated}: {row.location} and {clip.row.location}."
            faults.append(Fault(split, clip.name, "splits", message, clip.row))
    return faults


class _Memory:
    """Fingerprints of clips that passed, in a file beside the cached log-mels; it may be deleted."""

    def __init__(self, datasets: Iterable[AudioVisualDataset]) -> None:
        folder = next((dataset.cache.folder for dataset in datasets if dataset.cache.folder is not None), None)
        self.path = folder / "checked_clips.txt" if folder is not None else None
        self.good: frozenset[str] = frozenset()
        self.seen: set[str] = set()
        if self.path is not None:
            with suppress(OSError, UnicodeDecodeError):
                self.good = frozenset(self.path.read_text(encoding="ascii").split())

    def save(self) -> None:
        if self.path is not None and not self.seen <= self.good:
            with suppress(OSError):
                _write_atomically(self.path, "\n".join(sorted(self.good | self.seen)) + "\n")


def _fingerprint(dataset: AudioVisualDataset, clip: Clip) -> str:
    """A hash that changes with the clip's files and with the options that read them."""
    sound = stored_log_mel(clip) if dataset.uses_log_mel_file(clip) else clip.wav
    parts = [_CHECK_VERSION, dataset.task, str(dataset.num_classes), str(dataset.img_size), dataset.audio]
    parts.append(dataset.front_end.version)
    for path in (*clip.frames, *clip.masks, sound):
        try:
            status = path.stat()
        except OSError:
            return ""
        parts.append(f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _write_atomically(path: Path, text: str) -> None:
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def _same(item: Any) -> Any:
    return item
