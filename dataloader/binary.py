"""AVSBench's Single-source (s4) and Multi-sources (ms3) layouts: binary masks of the sounding objects."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dataloader.base import MAX_SECONDS, AudioVisualDataset, Clip
from dataloader.images import read_binary_mask
from dataloader.tables import Row, component, read_table, rows_of_split
from utils.errors import ConfigError
from utils.registry import DATASETS


class BinaryDataset(AudioVisualDataset):
    """Clips listed in one table, with separate folder trees of frames, sounds and masks.

    Args:
        split: 'train', 'val' or 'test'.
        anno_csv: the table.
        dir_img: root of the frames.
        dir_audio_log_mel: root of the pickled log-mels; may be missing where wave files exist.
        dir_mask: root of the masks.
        img_size: (height, width) of the items, pixels.
        batch_size: clips per batch.
        dir_audio_wav: root of the wave files; None = `audio_wav` beside `dir_audio_log_mel`.
        audio: 'auto', 'wav' or 'log_mel'.
        front_end: of the audio encoder.
        num_frames: T.
        num_labelled_frames: number of labelled frames, from the first; None = as AVSBench labels this split.
        cache_dir: for computed log-mels; None = `log_mel_cache` beside `dir_audio_wav`.
        flip: mirror training clips at random.
        single_frames: train on single labelled frames, see FrameItems.
        seed: of the mirror, negatives and augmentation.
        max_seconds: longest sound that is read.
        sound_labels: JSON file with what sounds and what is visible in each clip, see `dataloader.off_screen`; None =
            `sound_labels.json` beside the table where it exists.
        negatives: options of `dataloader.negatives.Negatives`, for training.
        augment: options of `dataloader.augment.Augment`, for training.
    """

    columns: ClassVar[tuple[str | tuple[str, ...], ...]]

    def __init__(
        self,
        split: str,
        anno_csv: str,
        dir_img: str,
        dir_audio_log_mel: str,
        dir_mask: str,
        img_size: Sequence[int] = (224, 224),
        batch_size: int = 1,
        dir_audio_wav: str | None = None,
        audio: str = "auto",
        front_end: str = "vggish",
        num_frames: int = 5,
        num_labelled_frames: int | None = None,
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
        wav = Path(dir_audio_wav) if dir_audio_wav is not None else Path(dir_audio_log_mel).parent / "audio_wav"
        super().__init__(
            split=split,
            img_size=img_size,
            batch_size=batch_size,
            num_frames=num_frames,
            audio=audio,
            front_end=front_end,
            cache_dir=cache_dir if cache_dir is not None else wav.parent / "log_mel_cache",
            crop=False,
            flip=flip,
            single_frames=single_frames,
            seed=seed,
            max_seconds=max_seconds,
            sound_labels=sound_labels,
            negatives=negatives,
            augment=augment,
        )
        self.num_labelled_frames = self.labelled_frames() if num_labelled_frames is None else num_labelled_frames
        if not 0 < self.num_labelled_frames <= num_frames:
            raise ConfigError(
                f"{type(self).__name__}: num_labelled_frames={num_labelled_frames}, "
                f"expected 1 to num_frames={num_frames}."
            )
        self.anno_csv = Path(anno_csv)
        self._dirs = {
            "frames": Path(dir_img),
            "masks": Path(dir_mask),
            "wav": wav,
            "log_mel": Path(dir_audio_log_mel),
        }
        self._roots = {key: path.resolve() for key, path in self._dirs.items()}
        rows = rows_of_split(read_table(self.anno_csv, self.columns), split, self.anno_csv)
        self.clips = [self._clip(row) for row in rows]

    def labelled_frames(self) -> int:
        """Number of frames per clip that AVSBench labels in this split."""
        return self.num_frames

    def roots(self) -> dict[str, Path]:
        """See the base class."""
        return self._roots

    def read_mask(self, path: Path) -> npt.NDArray[np.uint8]:
        """See the base class."""
        return read_binary_mask(path, self.placement)

    def locate(self, row: Row) -> tuple[Path, str, Path]:
        """Folder of a clip's frames, a frame file's name before its number, and the stem shared by masks and sounds."""
        raise NotImplementedError

    def _clip(self, row: Row) -> Clip:
        frames, prefix, stem = self.locate(row)
        name = row["name"]
        numbers = range(1, self.num_frames + 1)
        return Clip(
            name=name,
            frames=tuple(self._dirs["frames"] / frames / f"{prefix}_{number}.png" for number in numbers),
            masks=tuple(
                self._dirs["masks"] / stem / f"{name}_{number}.png" for number in numbers[: self.num_labelled_frames]
            ),
            wav=self._dirs["wav"] / f"{stem}.wav",
            log_mel=self._dirs["log_mel"] / f"{stem}.pkl",
            row=row,
        )


@DATASETS.register_module()
class S4Dataset(BinaryDataset):
    """Single-source: `{split}/{category}/{name}/{name}_{1..T}.png`; in training only the first frame has a label."""

    task: ClassVar[str] = "s4"
    columns: ClassVar[tuple[str | tuple[str, ...], ...]] = (("name", "video_id"), "category", "split")

    def labelled_frames(self) -> int:
        """One in training, all elsewhere."""
        return 1 if self.split == "train" else self.num_frames

    def locate(self, row: Row) -> tuple[Path, str, Path]:
        """See the base class."""
        name = component(row, "name")
        stem = Path(component(row, "split"), component(row, "category"), name)
        return stem, name, stem


@DATASETS.register_module()
class MS3Dataset(BinaryDataset):
    """Multi-sources: `{name}/{name}.mp4_{1..T}.png`; all frames have labels."""

    task: ClassVar[str] = "ms3"
    columns: ClassVar[tuple[str | tuple[str, ...], ...]] = (("name", "video_id"), "split")

    def locate(self, row: Row) -> tuple[Path, str, Path]:
        """See the base class."""
        name = component(row, "name")
        return Path(name), f"{name}.mp4", Path(component(row, "split"), name)
