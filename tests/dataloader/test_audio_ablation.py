"""Audio ablations: silence, noise, shuffled sounds."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dataloader.audio import SAMPLE_RATE, VGGISH, log_mel, samples_for_patches
from dataloader.audio_ablation import ReplacedSound, derangement
from utils.errors import DataError

REAL = (5, 10, 5, 10)


class Clips:
    """Four clips of 5 and 10 seconds, padded to 10 frames, each with a log-mel of its own number."""

    front_end = VGGISH
    clips: ClassVar = [SimpleNamespace(frames=(None,) * real, number=float(i + 1)) for i, real in enumerate(REAL)]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sound = torch.zeros(10, 1, 96, 64)
        sound[: REAL[index]] = self.read_log_mel(self.clips[index])
        return {"log_mel": sound, "name": str(index)}

    def read_log_mel(self, clip: Any) -> Tensor:
        return torch.full((len(clip.frames), 1, 96, 64), clip.number)


def heard(sound: str, seed: int = 0) -> list[Tensor]:
    items = ReplacedSound(Clips(), sound, seed)  # type: ignore[arg-type]
    found = [items[index] for index in range(len(items))]
    assert [item["name"] for item in found] == ["0", "1", "2", "3"]
    for item, real in zip(found, REAL, strict=True):
        assert item["log_mel"].shape == (10, 1, 96, 64) and not item["log_mel"][real:].any()
    return [item["log_mel"][:real] for item, real in zip(found, REAL, strict=True)]


def test_silence_is_the_log_mel_of_zeros() -> None:
    for sound, real in zip(heard("silence"), REAL, strict=True):
        assert torch.equal(sound, log_mel(torch.zeros(samples_for_patches(real)), SAMPLE_RATE))
        assert sound.max() < -4  # log(0.01)


def test_noise_is_each_clips_own_and_the_same_again() -> None:
    first = heard("noise")
    assert all(torch.equal(a, b) for a, b in zip(first, heard("noise"), strict=True))
    assert not torch.equal(first[0], first[2]) and not torch.equal(first[0], heard("noise", seed=1)[0])
    assert min(float(sound.mean()) for sound in first) > -4


def test_shuffled_clips_hear_one_another() -> None:
    found = [sound.unique().tolist() for sound in heard("shuffled")]
    assert sorted(found) == [[1.0], [2.0], [3.0], [4.0]]
    assert all(sound != [index + 1.0] for index, sound in enumerate(found))


def test_one_clip_cannot_be_shuffled() -> None:
    class One(Clips):
        clips: ClassVar = Clips.clips[:1]

    with pytest.raises(DataError, match="two clips or more"):
        ReplacedSound(One(), "shuffled", 0)  # type: ignore[arg-type]


@given(st.integers(2, 300), st.integers(0, 2**32))
def test_a_derangement_has_no_fixed_point(count: int, seed: int) -> None:
    order = derangement(count, seed)
    assert sorted(order) == list(range(count))
    assert all(index != number for index, number in enumerate(order))
