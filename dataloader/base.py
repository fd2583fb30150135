"""Base class of the data sets: reads the frames, masks and sound of a clip into the tensors of an item.

Notation: T frames per clip, H W pixels.
"""

import abc
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataloader.audio import MAX_SECONDS, VGGISH, LogMelCache, check_log_mel, read_stored_log_mel
from dataloader.front_ends import front_end as find_front_end
from dataloader.images import Placement, normalise, read_frame
from dataloader.negatives import Negatives
from dataloader.off_screen import Donors
from dataloader.tables import Row, inside
from utils.errors import ConfigError, DataError
from utils.runtime import warn

if TYPE_CHECKING:
    from dataloader.augment import Augment

AUDIO_SOURCES = ("auto", "wav", "log_mel")


@dataclass(frozen=True)
class Clip:
    """Files of one clip.

    `frames` are at most T, the rest of an item is padding; `masks` are the labels of the first `len(masks)` frames.
    """

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]
    wav: Path
    log_mel: Path
    row: Row


class AudioVisualDataset(Dataset[dict[str, Any]], abc.ABC):
    """Items of `num_frames` frames with their sound and masks.

    Subclasses fill `clips` and define `roots` (folders) and `read_mask` (one mask file).

    An item is a dictionary:
        frames: (T, 3, H, W) float32, normalised by ImageNet's mean and deviation; padding is zero.
        log_mel: (T, *shape) float32 of the front end, (T, 1, 96, 64) for VGGish; padding is zero.
        masks: (T, H, W) uint8 class indices, 0 = background; zero for frames without label.
        gt_temporal_mask_flag: (T,) float32, 1 = the frame has a label.
        vid_temporal_mask_flag: (T,) float32, 1 = a real frame, 0 = padding.
        name: the clip's name.

    Args:
        split: of the table, 'train', 'val' or 'test'.
        img_size: (height, width) of the items, pixels.
        batch_size: clips per batch, for the data module.
        num_frames: T.
        audio: 'auto' (the stored log-mel where it exists, else the wave file), 'wav' or 'log_mel'.
        front_end: of the audio encoder, see dataloader/front_ends.py; stored log-mels are VGGish's.
        cache_dir: where log-mels computed from wave files are kept.
        crop: resize the shorter side and take the centre, instead of stretching.
        flip: mirror each training clip with probability 1/2, drawn from (seed, epoch, clip).
        single_frames: train on single labelled frames in random order instead of whole clips; see FrameItems.
        seed: of the mirror, negatives and augmentation.
        max_seconds: longest sound that is read.
        sound_labels: what sounds and what is visible in each clip, see dataloader/off_screen.py.
        negatives: training clips with a wrong sound and empty masks, see dataloader/negatives.py; None = none.
        augment: random changes of training clips, see dataloader/augment.py; None = none. Items then have the keys
            changed_sound, (T,) bool, and changed_frames, () bool: True where this sound or these pictures will not
            come again, and features of them are not worth keeping.
    """

    task: ClassVar[str]

    def __init__(
        self,
        *,
        split: str,
        img_size: Sequence[int],
        batch_size: int,
        num_frames: int,
        audio: str,
        front_end: str,
        cache_dir: str | Path | None,
        crop: bool,
        flip: bool,
        single_frames: bool,
        seed: int,
        max_seconds: float,
        sound_labels: str | None = None,
        negatives: Mapping[str, Any] | None = None,
        augment: Mapping[str, Any] | None = None,
    ) -> None:
        """See the class."""
        if audio not in AUDIO_SOURCES:
            raise ConfigError(f"{type(self).__name__}: audio={audio!r}, expected one of {', '.join(AUDIO_SOURCES)}.")
        self.front_end = find_front_end(front_end)
        if audio == "log_mel" and self.front_end is not VGGISH:
            raise ConfigError(
                f"{type(self).__name__}: audio='log_mel' reads VGGish's log-mels, and the audio encoder needs those of "
                f"front_end={front_end!r}: set audio='wav'."
            )
        for key, value in (("batch_size", batch_size), ("num_frames", num_frames)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{type(self).__name__}: {key}={value!r}, expected a positive whole number.")
        height, width = check_size(type(self).__name__, "img_size", img_size)
        self.split = split
        self.img_size = (height, width)
        self.batch_size = batch_size
        self.num_frames = num_frames
        self.audio = audio
        self.max_seconds = max_seconds
        self.sound_labels = sound_labels
        for key, options in (("negatives", negatives), ("augment", augment)):
            if options is not None and split != "train":
                raise ConfigError(
                    f"{type(self).__name__}: {key} is for the split 'train', not for {split!r}; scores with other "
                    "sounds are given by test.sh --robust."
                )
        self.negatives = None if negatives is None else Negatives(type(self).__name__, negatives)
        self.augment = None if augment is None else _augment(type(self).__name__, augment)
        if self.augment is not None and self.augment.changes_waves and audio == "log_mel":
            raise ConfigError(
                f"{type(self).__name__}: audio='log_mel' reads no wave files, which augment.mix, gain_db and "
                "shift_seconds need: set audio='auto' or 'wav'."
            )
        self.flip = flip
        self.single_frames = single_frames
        self.seed = seed
        self.placement = Placement(height, width, crop=crop)
        self.cache = LogMelCache(cache_dir, self.front_end)
        self.num_classes = 1
        self.classes: list[str] = ["background", "sounding object"]
        self.clips: list[Clip] = []
        # Shared with the loader's workers, which live longer than an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64)
        if flip or self.negatives is not None or self.augment is not None:
            self._epoch.share_memory_()

    @abc.abstractmethod
    def read_mask(self, path: Path) -> npt.NDArray[np.uint8]:
        """Class indices (H, W) uint8 of one mask file."""

    @abc.abstractmethod
    def roots(self) -> dict[str, Path]:
        """Resolved root folders 'frames', 'masks', 'wav', 'log_mel'; files outside are refused."""

    def __len__(self) -> int:
        """Clips of the split."""
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one clip from disk.

        Raises:
            DataError: a file of it is missing, broken or unsafe; the message names the file and the line of the table.
        """
        return self.read_item(index, draw=index)

    def read_item(self, index: int, *, draw: int, frame: int | None = None) -> dict[str, Any]:
        """Read one clip, or one labelled frame of it as an item of one frame; in training with its random changes.

        Args:
            index: of the clip.
            draw: number of the item; its random changes are drawn from (seed, epoch, draw).
            frame: of the clip; None for all.
        """
        clip = self.clips[index]
        try:
            item = self.read_clip(clip) if frame is None else self._read_frame(clip, frame)
        except DataError as error:
            if clip.row.location in str(error):
                raise
            raise DataError(f"{clip.row.location}: {error}") from error
        self._change_sound(item, index, draw, frame)
        if self.augment is not None:
            item["frames"], item["masks"], changed = self.augment.picture(
                item["frames"], item["masks"], int(item["vid_temporal_mask_flag"].sum()), self._generator(draw, 3)
            )
            item["changed_frames"] = torch.tensor(changed)
        if self.flip and self.split == "train" and self._mirrored(draw):
            item["frames"], item["masks"] = item["frames"].flip(-1), item["masks"].flip(-1)
        return item

    def _change_sound(self, item: dict[str, Any], index: int, draw: int, frame: int | None) -> None:
        """Make a clip a negative one, and augment its sound, in place."""
        real = len(self.clips[index].frames)
        seconds = range(real) if frame is None else [frame]
        if self.augment is not None:
            item["changed_sound"] = torch.zeros(len(item["log_mel"]), dtype=torch.bool)
        source: int | None = index
        if self.negatives is not None:
            negative = self.negatives.draw(self, index, real, self._generator(draw, 1))
            if negative is not None:
                log_mel, source = negative
                item["log_mel"][: len(seconds)] = log_mel[list(seconds)]
                item["masks"] = torch.zeros_like(item["masks"])
        if self.augment is not None:
            heard = item["log_mel"][: len(seconds)]
            changed = self.augment.sound(self, index, source, heard, seconds, self._generator(draw, 2))
            item["log_mel"][: len(seconds)], item["changed_sound"][: len(seconds)] = changed

    def materialise(self, clip: Clip) -> None:
        """Make those files of a clip that are made on first use; called before they are read. Here: none.

        Raises:
            DataError: what they are made from is missing or broken.
        """

    def read_clip(self, clip: Clip) -> dict[str, Any]:
        """The item of a clip as it is on disk."""
        self.materialise(clip)
        height, width = self.img_size
        roots = self.roots()
        real, labelled = len(clip.frames), len(clip.masks)
        pixels = np.stack(
            [read_frame(inside(roots["frames"], path, clip.row.location), self.placement) for path in clip.frames]
        )
        frames = torch.zeros(self.num_frames, 3, height, width)
        frames[:real] = normalise(pixels)
        masks = torch.zeros(self.num_frames, height, width, dtype=torch.uint8)
        for index, path in enumerate(clip.masks):
            mask = self.read_mask(inside(roots["masks"], path, clip.row.location))
            masks[index] = torch.tensor(mask)
        log_mel = torch.zeros(self.num_frames, *self.front_end.shape)
        log_mel[:real] = self.read_log_mel(clip)
        return {
            "frames": frames,
            "log_mel": log_mel,
            "masks": masks,
            "gt_temporal_mask_flag": _flag(labelled, self.num_frames),
            "vid_temporal_mask_flag": _flag(real, self.num_frames),
            "name": clip.name,
        }

    def _read_frame(self, clip: Clip, frame: int) -> dict[str, Any]:
        self.materialise(clip)
        roots = self.roots()
        pixels = read_frame(inside(roots["frames"], clip.frames[frame], clip.row.location), self.placement)
        mask = self.read_mask(inside(roots["masks"], clip.masks[frame], clip.row.location))
        return {
            "frames": normalise(pixels[None].copy()),
            "log_mel": self.read_log_mel(clip)[frame : frame + 1],
            "masks": torch.tensor(mask)[None],
            "gt_temporal_mask_flag": torch.ones(1),
            "vid_temporal_mask_flag": torch.ones(1),
            "name": clip.name,
        }

    def read_log_mel(self, clip: Clip) -> Tensor:
        """Log-mel of a clip's real frames, (len(clip.frames), *shape) float32, from the source set by `audio`."""
        self.materialise(clip)
        patches = len(clip.frames)
        if self.uses_log_mel_file(clip):
            path = inside(self.roots()["log_mel"], stored_log_mel(clip), clip.row.location)
            return check_log_mel(read_stored_log_mel(path), path, patches=patches)
        if self.audio == "auto" and self.front_end is VGGISH and not clip.wav.is_file():
            raise DataError(f"{clip.row.location}: the sound is missing, both {clip.log_mel} and {clip.wav}.")
        stored = stored_log_mel(clip)
        if self.front_end is not VGGISH and stored.is_file() and not clip.wav.is_file():
            raise DataError(
                f"{clip.row.location}: the sound {clip.wav} is missing; {stored} is VGGish's log-mel, and "
                f"front_end={self.front_end.name!r} needs the wave file."
            )
        path = inside(self.roots()["wav"], clip.wav, clip.row.location)
        return self.cache.get(path, patches=patches, max_seconds=self.max_seconds)

    def uses_log_mel_file(self, clip: Clip) -> bool:
        """Whether the clip's sound is read from its stored log-mel instead of its `.wav`."""
        stored = self.audio == "auto" and self.front_end is VGGISH and stored_log_mel(clip).is_file()
        return self.audio == "log_mel" or stored

    @functools.cached_property
    def donors(self) -> Donors:
        """Clips whose sound may be heard with others in training."""
        return Donors(self, other_group=False)

    def prepare(self) -> None:
        """Read what training needs to know of other clips, once, before worker processes start.

        Raises:
            DataError: a single clip; labels that cannot be read, or that mixing needs and are unknown.
        """
        if self.augment is not None and self.augment.needs_donors and self.donors.labels is None:
            raise DataError(
                f"augment.mix adds sounds of which nothing is visible, and it is unknown what sounds in the clips of "
                f"{self.clips[0].row.table}: name a file by sound_labels (dataloader/README.md), or leave mix out."
            )
        if self.negatives is not None and self.negatives.needs_donors and self.donors.labels is None:
            warn(
                f"it is unknown what sounds in the clips of {self.clips[0].row.table}: negatives.off_screen takes any "
                "other clip's sound, of which something may be visible (sound_labels: dataloader/README.md)."
            )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the random changes, in running workers too."""
        self._epoch.fill_(epoch)

    def _generator(self, draw: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, int(self._epoch), draw, purpose))

    def _mirrored(self, index: int) -> bool:
        return bool(np.random.default_rng((self.seed, int(self._epoch), index)).random() < 0.5)


def stored_log_mel(clip: Clip) -> Path:
    """The clip's stored log-mel: `.safetensors` (scripts/data/prepare_avsbench.py) where it exists, else `.pkl`."""
    prepared = clip.log_mel.with_name(f"{clip.log_mel.stem}.safetensors")
    return prepared if prepared.is_file() else clip.log_mel


def check_size(owner: str, key: str, value: Sequence[int], expected: str = "(height, width)") -> tuple[int, int]:
    """Check a size in pixels from a config and return it as a tuple.

    Raises:
        ConfigError: it is not a pair of positive whole numbers.
    """
    if not isinstance(value, Sequence) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise ConfigError(f"{owner}: {key}={value!r}, expected {expected} in pixels.")
    return value[0], value[1]


def _augment(owner: str, options: Mapping[str, Any]) -> "Augment":
    from dataloader.augment import Augment  # imports torchvision, which nothing else here needs

    return Augment(owner, options)


def _flag(ones: int, length: int) -> Tensor:
    return (torch.arange(length) < ones).to(torch.float32)


__all__ = ["AUDIO_SOURCES", "MAX_SECONDS", "AudioVisualDataset", "Clip", "check_size"]
