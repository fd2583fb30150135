"""Training on single frames, so that a batch holds frames of different clips."""

from typing import Any

from torch.utils.data import Dataset

from dataloader.base import AudioVisualDataset


class FrameItems(Dataset[dict[str, Any]]):
    """The labelled frames of a data set as items of one frame each (T = 1).

    Frames of one clip are much alike; a batch of as many frames of different clips has a gradient of less variance.
    Blocks that relate the frames of a clip cannot be trained so.

    Args:
        dataset: of clips; its random changes are drawn per frame here.
    """

    def __init__(self, dataset: AudioVisualDataset) -> None:
        self.dataset = dataset
        self.frames = [(index, frame) for index, clip in enumerate(dataset.clips) for frame in range(len(clip.masks))]

    def __len__(self) -> int:
        """Labelled frames."""
        return len(self.frames)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One frame, with the keys of the data set's items."""
        clip, frame = self.frames[index]
        return self.dataset.read_item(clip, frame=frame, draw=index)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the random changes, in running workers too."""
        self.dataset.set_epoch(epoch)
