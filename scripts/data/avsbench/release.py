"""What AVSBench hands out: where its tables and clips are in an unpacked release, and where prepared clips go.

Layouts and names are those that AVSBench's code reads and writes (github.com/OpenNLPLab/AVSBench: preprocess_scripts,
avs_scripts/*/dataloader.py, avs_scripts/avss/color_dataloader.py); which clip of v1s and v1m is which of s4 and ms3 is
told by the column `vid` of metadata.csv.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dataloader.preflight import SPLITS, Fault
from dataloader.semantic import SUBSETS, frames_of, read_classes
from dataloader.tables import Row, all_cells, component, read_table
from dataloader.video import VIDEO_SUFFIXES, find_video
from utils.avsbench import SOURCE as AVSBENCH
from utils.errors import DataError

TASKS = ("s4", "ms3", "avss")
FOLDERS = {"s4": "Single-source", "ms3": "Multi-sources", "avss": "AVSS"}
TABLES = {"s4": "s4_meta_data.csv", "ms3": "ms3_meta_data.csv", "avss": "metadata.csv"}
CLASS_LIST = "label2idx.json"
NUM_CLASSES = 71
OBJECT, SEMANTIC = "object", "semantic"
SUBSET_OF = {"s4": "v1s", "ms3": "v1m"}
"""Task -> the subset of AVSBench-semantic with its clips."""
_SEMANTIC_FOLDERS = ("AVSBench-semantic", "AVSBench_semantic", "AVSBench_Semantic", "AVSS")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z")
_NUM_FRAMES = 5  # of s4 and ms3
_COLUMNS: dict[str, tuple[str | tuple[str, ...], ...]] = {
    "s4": (("name", "video_id"), "category", "split"),
    "ms3": (("name", "video_id"), "split"),
}


@dataclass(frozen=True)
class Files:
    """Files of a prepared clip."""

    frames: tuple[Path, ...]
    masks: tuple[Path, ...]
    wav: Path
    log_mel: Path


@dataclass(frozen=True)
class SourceClip:
    """Files of a clip as they are handed out, and those to make.

    Attributes:
        task: 's4', 'ms3' or 'avss'.
        name: in the prepared table.
        split: 'train', 'val' or 'test'.
        row: its line of the table.
        frames: the extracted frames, which need not exist where there is a video.
        video: None where there is none.
        masks: of the first frames.
        wav: may be missing where there is a video or a log-mel.
        log_mel: AVSBench's `.pkl`; may be missing.
        cells: its line of the prepared table.
        made: the files to make.
    """

    task: str
    name: str
    split: str
    row: Row
    frames: tuple[Path, ...]
    video: Path | None
    masks: tuple[Path, ...]
    wav: Path
    log_mel: Path
    cells: Mapping[str, str]
    made: Files


@dataclass(frozen=True)
class Release:
    """One task's data in an unpacked release.

    Attributes:
        task: 's4', 'ms3' or 'avss'.
        kind: 'object' (Single-source, Multi-sources) or 'semantic' (v1s, v1m, v2).
        table: the CSV.
        data: the folder that holds visual_frames, gt_masks, ... or v1s, v1m, v2.
    """

    task: str
    kind: str
    table: Path
    data: Path


@dataclass
class Listing:
    """Clips of a task, lines that cannot be used, and the prepared table's columns."""

    columns: tuple[str, ...] = ()
    clips: list[SourceClip] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    skipped: int = 0


def find_releases(source: Path, kind: str | None = None) -> dict[str, Release]:
    """The releases in a folder by task; for s4 and ms3 the object release goes before v1s and v1m.

    Args:
        source: the unpacked release, the folder around it, or one of its parts.
        kind: 'object' or 'semantic' to look for one only.

    Raises:
        DataError: there is none.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder: name the one that AVSBench was unpacked to.")
    found: dict[str, Release] = {}
    children = [source, *sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))]
    for task in ("s4", "ms3") if kind != SEMANTIC else ():
        folders = [folder for base in children for folder in (base, base / FOLDERS[task])]
        release = next(filter(None, (_object_release(task, folder) for folder in folders)), None)
        if release is not None:
            found[task] = release
    if kind != OBJECT:
        folders = [folder for base in children for folder in (base, *(base / name for name in _SEMANTIC_FOLDERS))]
        root = next((folder for folder in folders if _is_semantic(folder)), None)
        if root is not None:
            table = root / TABLES["avss"]
            found["avss"] = Release("avss", SEMANTIC, table, root)
            for task, subset in SUBSET_OF.items():
                if (root / subset).is_dir():
                    found.setdefault(task, Release(task, SEMANTIC, table, root))
    if not found:
        packed = sorted(path.name for path in source.iterdir() if path.suffix.lower() in _ARCHIVES)
        hint = f" Unpack {', '.join(packed[:6])} first." if packed else f" AVSBench is asked for at {AVSBENCH}."
        raise DataError(
            f"{source} holds no release of AVSBench: neither Single-source/{TABLES['s4']} nor "
            f"Multi-sources/{TABLES['ms3']} nor {TABLES['avss']} with v1s, v1m or v2.{hint}"
        )
    return found


def list_clips(release: Release, out: Path, s4_table: Path | None = None) -> Listing:
    """All clips of a release.

    Args:
        release: from `find_releases`.
        out: the folder of prepared data, which the paths of `made` begin with.
        s4_table: for v1s, a `s4_meta_data.csv` with the categories; None = the labels in `a_obj`.

    Raises:
        DataError: the table is missing or broken, or lists no clip of the task.
    """
    if release.task == "avss":
        read_classes(release.data / CLASS_LIST, NUM_CLASSES)
    listing = _list_object(release, out) if release.kind == OBJECT else _list_semantic(release, out, s4_table)
    _refuse_repeated(listing)
    if not listing.clips and not listing.faults:
        raise DataError(f"{release.table} lists no clip of {release.task}.")
    return listing


def layout(task: str, out: Path, cells: Mapping[str, str], frames: int, masks: int) -> Files:
    """The files of a prepared clip, as the data set of the task reads them.

    Args:
        task: 's4', 'ms3' or 'avss'.
        out: the folder of prepared data.
        cells: of the prepared table.
        frames: their number.
        masks: their number.
    """
    root = out / FOLDERS[task]
    if task == "avss":
        folder = root / cells["label"] / cells["uid"]
        return Files(
            tuple(folder / "frames" / f"{number}.jpg" for number in range(frames)),
            tuple(folder / "labels_rgb" / f"{number}.png" for number in range(masks)),
            folder / "audio.wav",
            folder / "audio.safetensors",
        )
    name = cells["name"] if task == "s4" else cells["video_id"]
    return _object_files(task, root / f"{task}_data", name, cells, frames, masks, ".safetensors")


def _object_files(
    task: str, data: Path, name: str, cells: Mapping[str, str], frames: int, masks: int, log_mel: str
) -> Files:
    """A clip in the layout of Single-source or Multi-sources."""
    stem = Path(cells["split"], cells["category"], name) if task == "s4" else Path(cells["split"], name)
    of_frames, prefix = (stem, name) if task == "s4" else (Path(name), f"{name}.mp4")
    return Files(
        tuple(data / "visual_frames" / of_frames / f"{prefix}_{number}.png" for number in range(1, frames + 1)),
        tuple(data / "gt_masks" / stem / f"{name}_{number}.png" for number in range(1, masks + 1)),
        data / "audio_wav" / stem.with_name(f"{name}.wav"),
        data / "audio_log_mel" / stem.with_name(f"{name}{log_mel}"),
    )


def _object_release(task: str, folder: Path) -> Release | None:
    inner = folder / f"{task}_data"
    table = next((path for path in (folder / TABLES[task], inner / TABLES[task]) if path.is_file()), None)
    if table is None and not (folder.name == FOLDERS[task] and folder.is_dir()):
        return None
    return Release(task, OBJECT, table or folder / TABLES[task], inner if inner.is_dir() else folder)


def _is_semantic(folder: Path) -> bool:
    subsets = any((folder / subset).is_dir() for subset in SUBSETS)
    return subsets or ((folder / TABLES["avss"]).is_file() and (folder / CLASS_LIST).is_file())


def _list_object(release: Release, out: Path) -> Listing:
    task = release.task
    columns = ("name", "start_second", "category", "split") if task == "s4" else ("video_id", "split")
    listing = Listing(columns)
    rows = read_table(release.table, _COLUMNS[task])
    full = all_cells(release.table)
    for row in rows:
        try:
            name = component(row, "name")
            cells = {"name": name, "video_id": name, "split": _split(row)}
            if task == "s4":
                cells["category"] = component(row, "category")
                cells["start_second"] = full[row.line].get("start_second", "0") or "0"
        except DataError as error:
            listing.faults.append(Fault(row["split"], row["name"], "table", str(error), row))
            continue
        needed = 1 if task == "s4" and cells["split"] == "train" else _NUM_FRAMES
        source = _object_files(task, release.data, name, cells, _NUM_FRAMES, _NUM_FRAMES, ".pkl")
        labelled = _labelled(source.masks, needed)
        raw = release.data / "raw_videos"
        listing.clips.append(
            SourceClip(
                task=task,
                name=name,
                split=cells["split"],
                row=row,
                frames=source.frames,
                video=find_video(raw / cells["split"] / cells["category"] if task == "s4" else raw, name),
                masks=source.masks[:labelled],
                wav=source.wav,
                log_mel=source.log_mel,
                cells={column: cells[column] for column in columns},
                made=layout(task, out, cells, _NUM_FRAMES, labelled),
            )
        )
    return listing


def _list_semantic(release: Release, out: Path, s4_table: Path | None) -> Listing:
    task = release.task
    rows = read_table(release.table, ("uid", "split", "label", *(() if task == "avss" else ("vid",))))
    full = all_cells(release.table)
    header = tuple(next(iter(full.values()), {}))
    columns = {"s4": ("name", "start_second", "category", "split"), "ms3": ("video_id", "split")}.get(task, header)
    categories: dict[str, str] = {}
    if task == "s4" and s4_table is not None:
        categories = {row["name"]: component(row, "category") for row in read_table(s4_table, _COLUMNS["s4"])}
    listing = Listing(columns)
    for row in rows:
        label = row["label"]
        if label != SUBSET_OF.get(task, label) or label not in SUBSETS:
            listing.skipped += label not in SUBSETS
            continue
        try:
            split, uid = _split(row), component(row, "uid")
            if task == "avss":
                name, cells = uid, full[row.line]
            else:
                name = component(row, "vid")
                cells = {"name": name, "video_id": name, "split": split, "start_second": "0"}
                if task == "s4":
                    cells["category"] = _category(row, full[row.line], categories, s4_table)
        except DataError as error:
            listing.faults.append(Fault(row["split"], row["uid"], "table", str(error), row))
            continue
        folder = release.data / label / uid
        frames, needed = frames_of(label, split)
        masks_folder = "labels_rgb" if (folder / "labels_rgb").is_dir() else "labels_semantic"
        if not (folder / masks_folder).is_dir():
            masks_folder = "labels_rgb"
        masks = tuple(folder / masks_folder / f"{number}.png" for number in range(frames))
        labelled = _labelled(masks, needed)
        listing.clips.append(
            SourceClip(
                task=task,
                name=name,
                split=split,
                row=row,
                frames=tuple(folder / "frames" / f"{number}.jpg" for number in range(frames)),
                video=_video_in(folder),
                masks=masks[:labelled],
                wav=folder / "audio.wav",
                log_mel=folder / "audio.pkl",
                cells={column: cells[column] for column in columns},
                made=layout(task, out, cells, frames, labelled),
            )
        )
    return listing


def _category(row: Row, cells: Mapping[str, str], categories: Mapping[str, str], s4_table: Path | None) -> str:
    if s4_table is None:
        label = cells.get("a_obj", "") or "unknown"
        return component(Row({"a_obj": label}, row.line, row.table), "a_obj")
    if row["vid"] not in categories:
        raise DataError(f"{row.location}: {s4_table} has no clip {row['vid']!r}, whose category is needed.")
    return categories[row["vid"]]


def _split(row: Row) -> str:
    split = component(row, "split")
    if split not in SPLITS:
        raise DataError(f"{row.location}: the split {split!r} is none of {', '.join(SPLITS)}.")
    return split


def _labelled(masks: tuple[Path, ...], needed: int) -> int:
    """Number of labelled frames: what the task needs, and those beyond that exist."""
    return next((number for number in range(needed, len(masks)) if not masks[number].is_file()), len(masks))


def _video_in(folder: Path) -> Path | None:
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES)
    except OSError:
        files = []
    return files[0] if files else find_video(folder.parent, folder.name)


def _refuse_repeated(listing: Listing) -> None:
    """Keep the first of several clips with one name."""
    seen: dict[str, SourceClip] = {}
    for clip in listing.clips:
        if clip.name in seen:
            lines = f"lines {seen[clip.name].row.line} and {clip.row.line} of {clip.row.table}"
            message = f"the clip {clip.name} is listed twice, in {lines}: remove one line."
            listing.faults.append(Fault(clip.split, clip.name, "table", message, clip.row))
        else:
            seen[clip.name] = clip
    listing.clips = list(seen.values())
