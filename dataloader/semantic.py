"""AVSBench's semantic layout (avss): masks of 71 classes for clips of 5 and 10 seconds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dataloader.base import MAX_SECONDS, AudioVisualDataset, Clip, check_size
from dataloader.images import read_colour_mask
from dataloader.palette import MAX_CLASSES
from dataloader.tables import Row, component, read_table
from utils.errors import ConfigError, DataError
from utils.registry import DATASETS

# label column of the table -> (frames, labelled frames in training); in val and test all frames are labelled
SUBSETS = {"v1s": (5, 1), "v1m": (5, 5), "v2": (10, 10)}


def frames_of(label: str, split: str) -> tuple[int, int]:
    """Number of frames of an AVSS clip, and number of labelled ones among them, from the first."""
    frames, labelled_in_training = SUBSETS[label]
    return frames, labelled_in_training if split == "train" else frames


@DATASETS.register_module()
class AVSSDataset(AudioVisualDataset):
    """AVSS: `{label}/{uid}/{frames/{0..}.jpg, labels_rgb/{0..}.png, audio.wav|audio.pkl}`, padded to T frames.

    Args:
        split: 'train', 'val' or 'test'.
        meta_csv_path: the table (uid, split, label); lines with labels other than v1s, v1m, v2 are skipped.
        label_idx_path: JSON from class name to class index.
        dir_base: root of the data.
        num_classes: classes, background included.
        num_frames: T; 5-second clips are padded to it.
        img_size: (height, width) of the items where nothing is cropped, pixels.
        crop_img_and_mask: True: items are `crop_size` square, cropped at the centre in training, stretched else.
        crop_size: side, pixels.
        resize_pred_mask: whether saved predictions are resized; read by the test script.
        save_pred_mask_img_size: (width, height) of saved predictions, in Pillow's order as published; read by the test
            script.
        batch_size: clips per batch.
        audio: 'auto', 'wav' or 'log_mel'.
        front_end: of the audio encoder.
        cache_dir: for computed log-mels; None = `log_mel_cache` in `dir_base`.
        flip: mirror training clips at random.
        single_frames: train on single labelled frames, see FrameItems.
        seed: of the mirror, negatives and augmentation.
        max_seconds: longest sound that is read.
        sound_labels: JSON file with what sounds and what is visible in each clip, see `dataloader.off_screen`; None =
            `sound_labels.json` beside the table where it exists.
        negatives: options of `dataloader.negatives.Negatives`, for training.
        augment: options of `dataloader.augment.Augment`, for training.
    """

    task: ClassVar[str] = "avss"

    def __init__(
        self,
        split: str,
        meta_csv_path: str,
        label_idx_path: str,
        dir_base: str,
        num_classes: int = 71,
        num_frames: int = 10,
        img_size: Sequence[int] = (224, 224),
        crop_img_and_mask: bool = True,
        crop_size: int = 224,
        resize_pred_mask: bool = True,
        save_pred_mask_img_size: Sequence[int] = (360, 240),
        batch_size: int = 1,
        audio: str = "auto",
        front_end: str = "vggish",
        cache_dir: str | None = None,
        flip: bool = False,
        single_frames: bool = False,
        seed: int = 0,
        max_seconds: float = MAX_SECONDS,
        sound_labels: str | None = None,
        negatives: Mapping[str, Any] | None = None,
        augment: Mapping[str, Any] | None = None,
    ) -> None:
        """See the class."""
        if not 2 <= num_classes <= MAX_CLASSES:
            raise ConfigError(f"AVSSDataset: num_classes={num_classes}, expected 2 to {MAX_CLASSES}.")
        super().__init__(
            split=split,
            img_size=(crop_size, crop_size) if crop_img_and_mask else img_size,
            batch_size=batch_size,
            num_frames=num_frames,
            audio=audio,
            front_end=front_end,
            cache_dir=cache_dir if cache_dir is not None else Path(dir_base) / "log_mel_cache",
            crop=crop_img_and_mask and split == "train",
            flip=flip,
            single_frames=single_frames,
            seed=seed,
            max_seconds=max_seconds,
            sound_labels=sound_labels,
            negatives=negatives,
            augment=augment,
        )
        self.resize_pred_mask = resize_pred_mask
        self.save_pred_mask_img_size = check_size(
            "AVSSDataset", "save_pred_mask_img_size", save_pred_mask_img_size, "(width, height)"
        )
        self.num_classes = num_classes
        self.classes = read_classes(label_idx_path, num_classes)
        self.meta_csv_path = Path(meta_csv_path)
        self.dir_base = Path(dir_base)
        self._root = self.dir_base.resolve()
        rows = read_table(self.meta_csv_path, ("uid", "split", "label"))
        known = [row for row in rows if row["label"] in SUBSETS]
        self.clips = [self._clip(row) for row in known if row["split"] == split]
        if not self.clips:
            labels = sorted({row["label"] for row in rows})
            splits = sorted({row["split"] for row in known})
            raise DataError(
                f"{self.meta_csv_path} has no clip of the split {split!r} with the label {', '.join(SUBSETS)}; "
                f"it has the splits {', '.join(splits) or '-'} and the labels {', '.join(labels[:8]) or '-'}."
            )

    def roots(self) -> dict[str, Path]:
        """See the base class."""
        return dict.fromkeys(("frames", "masks", "wav", "log_mel"), self._root)

    def read_mask(self, path: Path) -> npt.NDArray[np.uint8]:
        """See the base class."""
        return read_colour_mask(path, self.placement, self.num_classes)

    def _clip(self, row: Row) -> Clip:
        folder = self.dir_base / component(row, "label") / component(row, "uid")
        real, labelled = (min(count, self.num_frames) for count in frames_of(row["label"], self.split))
        return Clip(
            name=row["uid"],
            frames=tuple(folder / "frames" / f"{number}.jpg" for number in range(real)),
            masks=tuple(folder / "labels_rgb" / f"{number}.png" for number in range(labelled)),
            wav=folder / "audio.wav",
            log_mel=folder / "audio.pkl",
            row=row,
        )


def read_classes(path: str | Path, num_classes: int) -> list[str]:
    """Class names by index; an index without a name is called 'class N'.

    Raises:
        DataError: the file is missing or is not a JSON object from names to indices; an index is repeated or too large.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"the class list {path} is missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"the class list {path} is not readable JSON ({error}).") from error
    if not isinstance(table, dict) or not all(type(index) is int for index in table.values()):
        raise DataError(f"the class list {path} must be a JSON object from class names to indices.")
    names = [f"class {index}" for index in range(num_classes)]
    taken: set[int] = set()
    for name, index in table.items():
        if not 0 <= index < num_classes:
            raise DataError(f"the class list {path} gives {name!r} the index {index}, but num_classes={num_classes}.")
        if index in taken:
            raise DataError(f"the class list {path} gives the index {index} to {names[index]!r} and to {name!r}.")
        taken.add(index)
        names[index] = name
    return names
