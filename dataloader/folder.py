"""A researcher's own folder: videos, or folders of frames, with sounds and masks, listed in one CSV."""

import hashlib
import itertools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image

from dataloader.base import MAX_SECONDS, AudioVisualDataset, Clip
from dataloader.images import read_binary_mask, read_colour_mask
from dataloader.palette import MAX_CLASSES
from dataloader.semantic import read_classes
from dataloader.tables import Row, all_cells, component, inside, read_table, rows_of_split
from dataloader.video import frame_times, read_video_frames, read_video_sound
from utils.errors import ConfigError, DataError
from utils.registry import DATASETS
from utils.runtime import warn

TASKS = ("s4", "ms3", "avss")
OPTIONAL_COLUMNS = ("audio", "masks", "start", "seconds", "rate", "category")
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg")
MASK_SUFFIXES = (".png",)  # JPEG changes classes, and what is black
CACHE = "clip_cache"
_CACHE_VERSION = "1"


@dataclass(frozen=True)
class _Origin:
    """What a clip's files are made from.

    Attributes:
        video: frames, and the sound where `sound`, are taken from it; None where they are files of their own.
        start: of the clip in the video, seconds.
        sound: the sound is the video's own.
        problem: why the clip cannot be read; empty where nothing is known yet.
    """

    video: Path | None = None
    start: float = 0.0
    sound: bool = False
    problem: str = ""


@DATASETS.register_module()
class FolderDataset(AudioVisualDataset):
    """Clips listed in a CSV, under any task's protocol.

    Columns of the table; paths are relative to `root`:
        name: of the clip, unique. split: 'train', 'val' or 'test'.
        video: a video file, or a folder of frames (PNG or JPEG), sorted by the last numbers in their names; these have
            one step (1, 2, 3 or 0, 33, 67), so that no frame is missing.
        audio (optional): a sound file that begins with the clip; empty = the video's own sound.
        masks (optional): a folder of masks (PNG) of the clip's first frames, numbered without gaps, one per second.
        start (optional): of the clip in its video or frames, seconds.
        seconds (optional): length of a clip that is shorter than `num_frames`; the rest of the item is padding.
        rate (optional): frames per second of a folder of frames; empty = 1.
        category (optional): what sounds, for off-screen sounds in s4.

    A clip has one frame per second, the one that AVSBench would take (`dataloader.video.frame_times`). In training, s4
    uses the mask of the first frame, ms3 and avss all masks; in val and test all count. Clips without masks are left
    out. Masks of s4 and ms3: any pixel that is not black is object; of avss: class indices, or AVSS's colours. Frames
    and sounds of videos are extracted on first use, with the shorter side at most max(img_size), into `cache_dir`.

    Args:
        split: 'train', 'val' or 'test'.
        anno_csv: the table.
        task: 's4', 'ms3' or 'avss': labelled frames, classes and scores.
        root: folder of the data; None = that of the table.
        num_frames: T; None = 5, for avss 10.
        num_classes: classes of avss, background included; None = 71.
        label_idx_path: for avss, JSON from class name to index; None = numbered names.
        img_size: (height, width) of the items, pixels.
        batch_size: clips per batch.
        audio: 'auto' or 'wav', both the same here.
        front_end: of the audio encoder.
        cache_dir: of extracted frames and sounds, and of log-mels; None = `clip_cache` in `root`.
        resize_pred_mask: as in AVSSDataset.
        save_pred_mask_img_size: as in AVSSDataset.
        flip: mirror training clips at random.
        single_frames: train on single labelled frames, see FrameItems.
        seed: of the mirror, negatives and augmentation.
        max_seconds: longest sound that is read.
        sound_labels: see `dataloader.off_screen`.
        negatives: options of `dataloader.negatives.Negatives`, for training.
        augment: options of `dataloader.augment.Augment`, for training.

    Raises:
        ConfigError: an unknown task, or a value out of its range.
        DataError: the table is missing or broken, or has no clip with masks in the split. Faults of single clips are
            raised when they are read.
    """

    def __init__(
        self,
        split: str,
        anno_csv: str,
        task: str,
        root: str | None = None,
        num_frames: int | None = None,
        num_classes: int | None = None,
        label_idx_path: str | None = None,
        img_size: Sequence[int] = (224, 224),
        batch_size: int = 1,
        audio: str = "auto",
        front_end: str = "vggish",
        cache_dir: str | None = None,
        resize_pred_mask: bool = False,
        save_pred_mask_img_size: Sequence[int] = (360, 240),
        flip: bool = False,
        single_frames: bool = False,
        seed: int = 0,
        max_seconds: float = MAX_SECONDS,
        sound_labels: str | None = None,
        negatives: Mapping[str, Any] | None = None,
        augment: Mapping[str, Any] | None = None,
    ) -> None:
        """See the class."""
        if task not in TASKS:
            raise ConfigError(f"FolderDataset: task={task!r}, expected one of {', '.join(TASKS)}.")
        if audio == "log_mel":
            raise ConfigError("FolderDataset: audio='log_mel', but it reads no stored log-mels: set audio='auto'.")
        if task != "avss" and (num_classes or label_idx_path):
            raise ConfigError(f"FolderDataset: num_classes and label_idx_path are for task='avss', not for {task!r}.")
        self.anno_csv = Path(anno_csv)
        self.root = Path(root) if root is not None else self.anno_csv.parent
        self.cache_dir = Path(cache_dir) if cache_dir is not None else self.root / CACHE
        super().__init__(
            split=split,
            img_size=img_size,
            batch_size=batch_size,
            num_frames=num_frames if num_frames is not None else 10 if task == "avss" else 5,
            audio="wav" if audio == "auto" else audio,
            front_end=front_end,
            cache_dir=self.cache_dir / "log_mel_cache",
            crop=False,
            flip=flip,
            single_frames=single_frames,
            seed=seed,
            max_seconds=max_seconds,
            sound_labels=sound_labels,
            negatives=negatives,
            augment=augment,
        )
        self.task = task  # type: ignore[misc]
        self.resize_pred_mask = resize_pred_mask
        self.save_pred_mask_img_size = tuple(save_pred_mask_img_size)
        if task == "avss":
            self.num_classes = 71 if num_classes is None else num_classes
            if not 2 <= self.num_classes <= MAX_CLASSES:
                raise ConfigError(f"FolderDataset: num_classes={num_classes}, expected 2 to {MAX_CLASSES}.")
            self.classes = [f"class {index}" for index in range(self.num_classes)]
            if label_idx_path is not None:
                self.classes = read_classes(label_idx_path, self.num_classes)
        self._root = self.root.resolve()
        both = Path(os.path.commonpath([self._root, self.cache_dir.resolve()]))
        self._roots = {"frames": both, "wav": both, "masks": self._root, "log_mel": self._root}
        self._origins: dict[str, _Origin] = {}
        self.clips = self._read_clips()

    def roots(self) -> dict[str, Path]:
        """See the base class; the folder's own files are checked against `root` when a clip is read."""
        return self._roots

    def read_mask(self, path: Path) -> npt.NDArray[np.uint8]:
        """See the base class."""
        if self.task == "avss":
            return read_colour_mask(path, self.placement, self.num_classes)
        return read_binary_mask(path, self.placement)

    def materialise(self, clip: Clip) -> None:
        """See the base class: extract the frames and the sound of a video into `cache_dir`."""
        origin = self._origins[clip.name]
        if origin.problem:
            raise DataError(f"{clip.row.location}: {origin.problem}")
        if origin.video is None:
            for path in clip.frames:
                inside(self._root, path, clip.row.location)
        if not origin.sound:
            inside(self._root, clip.wav, clip.row.location)
        if origin.video is None or clip.frames[0].parent.is_dir():
            return
        inside(self._root, origin.video, clip.row.location)
        frames = read_video_frames(origin.video, len(clip.frames), start=origin.start)
        sound = read_video_sound(origin.video, len(clip.frames), start=origin.start) if origin.sound else None
        try:
            self._store(clip, frames, sound)
        except OSError as error:
            raise DataError(
                f"{self.cache_dir} cannot be written ({error.strerror}), where frames of {origin.video} are kept: make "
                "room, or set cache_dir of the data set."
            ) from error

    def _store(
        self, clip: Clip, frames: Sequence[Image.Image], sound: tuple[npt.NDArray[np.int16], int] | None
    ) -> None:
        """Write a video's files into a folder of their own, which appears when all are there."""
        folder = clip.frames[0].parent
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part_", dir=folder.parent))
        try:
            part.chmod(0o755)
            for image, path in zip(frames, clip.frames, strict=True):
                self._reduced(image).save(part / path.name)
            if sound is not None:
                with (part / clip.wav.name).open("wb") as file:
                    soundfile.write(file, *sound, format="WAV", subtype="PCM_16")
            try:
                part.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _reduced(self, image: Image.Image) -> Image.Image:
        """A frame as it is kept: its aspect stays, its shorter side is at most the longer one of the items."""
        scale = max(self.img_size) / min(image.size)
        if scale >= 1:
            return image
        return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)

    def _read_clips(self) -> list[Clip]:
        rows = rows_of_split(read_table(self.anno_csv, ("name", "split", "video")), self.split, self.anno_csv)
        optional = all_cells(self.anno_csv)
        clips: list[Clip] = []
        without: list[Clip] = []
        for row in rows:
            more = {column: optional[row.line].get(column, "") for column in OPTIONAL_COLUMNS}
            clip = self._clip(Row({**row.cells, **more}, row.line, row.table))
            (clips if clip.masks else without).append(clip)
        if without:
            message = f"{len(without)} of {len(rows)} clips of the split {self.split!r} of {self.anno_csv}"
            if not clips:
                raise DataError(f"all {message} are without masks: name their folders in the column 'masks'.")
            warn(f"{message} are without masks, and are left out: {', '.join(clip.name for clip in without[:5])} ...")
        return clips

    def _clip(self, row: Row) -> Clip:
        """A clip whose faults, other than of the table, are kept for when it is read."""
        component(row, "name")
        component(row, "category")
        video = self.root / row["video"]
        start = _number(row, "start", 0.0, least=0.0)
        length = min(self.num_frames, int(_number(row, "seconds", self.num_frames, least=1.0)))
        problem = ""
        if video.is_dir():
            frames, problem = self._listed_frames(row, video, start, length)
            origin = _Origin()
            wav = self.root / row["audio"]
            if not row["audio"]:
                problem = problem or f"{video} is a folder of frames: name its sound in the column 'audio'."
        else:
            folder = self.cache_dir / self._key(video, start, length, own_sound=not row["audio"])
            frames = tuple(folder / f"{number}.png" for number in range(length))
            wav = self.root / row["audio"] if row["audio"] else folder / "audio.wav"
            origin = _Origin(video, start, not row["audio"])
        masks, fault = self._listed_masks(row, len(frames))
        if problem or fault:
            origin = _Origin(origin.video, origin.start, origin.sound, problem or fault)
        if row["name"] in self._origins:
            raise DataError(f"{row.location}: the name {row['name']!r} occurs twice: give each clip its own.")
        self._origins[row["name"]] = origin
        return Clip(row["name"], frames, masks, wav, wav.with_suffix(".pkl"), row)

    def _listed_frames(self, row: Row, folder: Path, start: float, length: int) -> tuple[tuple[Path, ...], str]:
        """The frame of each second, and what is wrong with the folder."""
        rate = _number(row, "rate", 1.0, least=1e-3)
        files = _numbered(folder, FRAME_SUFFIXES)
        none = (folder / "0.png",)
        if rate < 1:
            return none, f"rate={row['rate']!r} is below one frame per second, which a clip needs."
        if gap := _gap([number for number, _ in files]):
            return none, (
                f"the frames in {folder} have the numbers {gap}, whose steps differ: add what is missing, remove what "
                "is no frame, or number the frames anew."
            )
        # the same pictures as of a video of this rate; times are the middles of the pictures
        indices = [int((start + time) * rate) for time in frame_times(rate, length)]
        there = tuple(files[index][1] for index in indices if index < len(files))
        if not there:
            return none, f"the folder {folder} has {len(files)} frames (PNG, JPEG), none at {start:g} s."
        if len(there) < length and (row["seconds"] or self.task != "avss"):
            return there, (
                f"the folder {folder} has {len(files)} frames, which at rate={rate:g} are {len(there)} of {length} "
                "seconds: add frames, or give the length in the column 'seconds'."
            )
        return there, ""

    def _listed_masks(self, row: Row, frames: int) -> tuple[tuple[Path, ...], str]:
        """The masks of the first frames, and what is wrong with them."""
        if not row["masks"]:
            return (), ""
        folder = self.root / row["masks"]
        wanted = 1 if self.task == "s4" and self.split == "train" else frames
        if not folder.is_dir():
            return (folder / "0.png",), f"the folder of masks {folder} is missing."
        found = _numbered(folder, MASK_SUFFIXES)
        if not found:
            return (folder / "0.png",), f"the folder of masks {folder} has no PNG."
        numbers = [number for number, _ in found]
        if numbers[0] not in (0, 1) or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            shown = ", ".join(str(number) for number in numbers[:6])
            return (found[0][1],), (
                f"the masks in {folder} have the numbers {shown}; they belong to the first frames, one per second, and "
                "are numbered from 0 or 1 without gaps."
            )
        return tuple(path for _, path in found[:wanted]), ""

    def _key(self, video: Path, start: float, length: int, *, own_sound: bool) -> str:
        """Name of the folder of a video's extracted files; another one when the video changes."""
        try:
            status = video.stat()
            state = f"{status.st_size}|{status.st_mtime_ns}"
        except OSError:
            state = "missing"
        text = f"{_CACHE_VERSION}|{video.resolve()}|{state}|{start}|{length}|{max(self.img_size)}|{own_sound}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _numbered(folder: Path, suffixes: Sequence[str]) -> list[tuple[int, Path]]:
    """Images of a folder with the last number in their names, in this order; -1 where there is none."""
    found = []
    for path in folder.iterdir():
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            numbers = re.findall(r"\d+", path.stem)
            found.append((int(numbers[-1]) if numbers else -1, path))
    return sorted(found, key=lambda pair: (pair[0], pair[1].name))


def _gap(numbers: Sequence[int]) -> str:
    """Where ascending numbers leave their usual step by half or more: the neighbours, as text; empty: nowhere.

    Numbers may be times (0, 33, 67, 100 ms), whose steps differ by rounding.
    """
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    usual = max(steps, key=steps.count, default=0)
    for at, step in enumerate(steps):
        if abs(step - usual) * 2 >= max(usual, 1) or (numbers[at] < 0 and step):  # -1: a name without a number
            return ", ".join(str(number) for number in numbers[max(at - 1, 0) : at + 3])
    return ""


def _number(row: Row, column: str, default: float, *, least: float) -> float:
    """A cell as a number.

    Raises:
        DataError: it is none, not finite, or below `least`.
    """
    text = row[column]
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < least:
        raise DataError(f"{row.location}: {column}={text!r}, expected a number of {least:g} or more.")
    return value
