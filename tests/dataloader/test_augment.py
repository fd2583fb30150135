"""Augmentation: what changes, what stays, and the same again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from dataloader import AudioVisualDataset
from dataloader.augment import Augment
from dataloader.frame_items import FrameItems
from tests.dataloader.test_negatives import only, train
from tests.dataloader.test_off_screen import write_labels
from utils.errors import ConfigError, DataError

Splits = Callable[..., dict[str, Any]]
EVERYTHING: dict[str, Any] = {
    "mix": {"rate": 0.5, "level_db": (-6, 0)},
    "gain_db": 6.0,
    "shift_seconds": 0.2,
    "spec_augment": {"time": 0.2, "frequency": 0.2},
    "scale": (0.7, 1.4),
    "crop": True,
    "colour": {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.05},
}


@pytest.mark.parametrize(("task", "front_end"), [("s4", "vggish"), ("ms3", "aisfx"), ("avss", "vggish")])
def test_augmented_items_keep_the_contract_and_come_again(own: Path, splits: Splits, task: str, front_end: str) -> None:
    write_labels(own, task)
    plain = train(own, splits, task, front_end=front_end)
    data = train(own, splits, task, front_end=front_end, augment=EVERYTHING)
    again = train(own, splits, task, front_end=front_end, augment=EVERYTHING)
    for index, clip in enumerate(plain.clips):
        before, item, real = plain[index], data[index], len(clip.frames)
        assert set(item) - set(before) == {"changed_sound", "changed_frames"}
        for key in set(before) - {"name"}:
            assert item[key].shape == before[key].shape and item[key].dtype == before[key].dtype
            assert torch.isfinite(item[key].float()).all()
        assert all(torch.equal(item[key], again[index][key]) for key in item if key != "name")
        assert item["changed_frames"] and not torch.equal(item["frames"], before["frames"])
        assert not item["frames"][real:].any() and not item["log_mel"][real:].any()
        changed = (item["log_mel"] != before["log_mel"]).flatten(1).any(1)
        assert torch.equal(changed | item["changed_sound"], item["changed_sound"]) and changed.any()
    data.set_epoch(1)
    assert not torch.equal(data[0]["frames"], again[0]["frames"])


def write_sound(data: AudioVisualDataset, index: int, sound: np.ndarray) -> None:
    data.clips[index].wav.write_bytes(b"")
    soundfile.write(data.clips[index].wav, sound.astype(np.float32), 16_000, subtype="PCM_16")


def half_silent(pitch: float) -> np.ndarray:
    """A tone in the first and third second of five, noise of -60 dB else; windows of VGGish begin every 0.96 s."""
    time = np.arange(5 * 16_000) / 16_000
    audible = ((time < 0.94) | ((time >= 2) & (time < 2.85))) * 0.1
    return audible * np.sin(2 * np.pi * pitch * time) + 0.001 * np.random.default_rng(0).standard_normal(len(time))


@pytest.mark.parametrize("front_end", ["vggish", "aisfx"])
def test_silent_seconds_stay_silent(own: Path, splits: Splits, front_end: str) -> None:
    write_labels(own, "ms3")
    options = {"mix": {"rate": 1.0}, "gain_db": 12.0, "shift_seconds": 0.9, "spec_augment": {}}
    plain = train(own, splits, front_end=front_end)
    for index in range(4):
        write_sound(plain, index, half_silent(300.0 * (index + 1)))
    data = train(own, splits, front_end=front_end, augment=options)
    for epoch in range(3):
        data.set_epoch(epoch)
        for index in range(4):
            before, after = plain[index]["log_mel"], data[index]["log_mel"]
            # SpecAugment lowers what is left of silence to the log-mel of zeros, and raises nothing.
            assert (after[[1, 3, 4]] <= before[[1, 3, 4]]).all()
            assert not torch.equal(after[0], before[0])
            if front_end == "aisfx":
                assert not after[[1, 3, 4]].any() and not data[index]["changed_sound"][[1, 3, 4]].any()


def test_gain_changes_the_level_and_a_shift_only_the_time(own: Path, splits: Splits) -> None:
    plain = train(own, splits)
    write_sound(plain, 0, 0.05 * np.sin(2 * np.pi * 1000 * np.arange(5 * 16_000) / 16_000))
    before = plain[0]["log_mel"].amax((1, 2, 3))
    levels = []
    for epoch in range(8):
        data = train(own, splits, augment={"gain_db": 6.0})
        data.set_epoch(epoch)
        change = (data[0]["log_mel"].amax((1, 2, 3)) - before) * 20 / np.log(10)  # dB
        assert change.std() < 0.1 and change.abs().max() < 6.1
        levels.append(float(change[0]))
    assert min(levels) < -1 and max(levels) > 1
    shifted = train(own, splits, augment={"shift_seconds": 0.3})[0]["log_mel"]
    assert not torch.equal(shifted, plain[0]["log_mel"])
    torch.testing.assert_close(shifted.mean((1, 2)), plain[0]["log_mel"].mean((1, 2)), rtol=0, atol=0.3)


@pytest.mark.parametrize("front_end", ["vggish", "aisfx"])
def test_a_sound_that_is_hardly_changed_has_the_clips_own_log_mel(drawn: Path, splits: Splits, front_end: str) -> None:
    plain = train(drawn, splits, front_end=front_end)
    data = train(drawn, splits, front_end=front_end, augment={"gain_db": 1e-6})
    for index in range(4):
        item = data[index]
        assert item["changed_sound"].any()
        torch.testing.assert_close(item["log_mel"], plain[index]["log_mel"], rtol=1e-4, atol=1e-4)
        frame = data.read_item(index, draw=0, frame=3)["log_mel"]
        torch.testing.assert_close(frame[0], plain[index]["log_mel"][3], rtol=1e-4, atol=1e-4)


def test_negatives_are_augmented_as_all_clips_are(own: Path, splits: Splits) -> None:
    write_labels(own, "s4")
    spec = {"spec_augment": {"time": 0.3, "frequency": 0.3}, "gain_db": 6.0}
    for kind, changes in (("off_screen", True), ("noise", True), ("silence", False)):
        exact = train(own, splits, "s4", negatives=only(kind))
        data = train(own, splits, "s4", negatives=only(kind), augment=spec)
        for index in range(4):
            item = data[index]
            assert not item["masks"].any() and bool(item["changed_sound"].all()) == changes
            assert torch.equal(item["log_mel"], exact[index]["log_mel"]) != changes


def test_the_added_sound_is_off_screen_and_of_the_level_asked_for(own: Path, splits: Splits) -> None:
    clips = write_labels(own, "ms3")["clips"]
    plain = train(own, splits)
    time = np.arange(5 * 16_000) / 16_000
    for index in range(4):  # pure tones in mel bands far apart
        write_sound(plain, index, 0.1 * np.sin(2 * np.pi * (300, 900, 2500, 6000)[index] * time))
    bands = [int(plain[index]["log_mel"][2, 0].mean(0).argmax()) for index in range(4)]
    data = train(own, splits, augment={"mix": {"rate": 1.0, "level_db": (-6, -6)}})
    mixed = 0
    for index, clip in enumerate(data.clips):
        levels = data[index]["log_mel"][2, 0].mean(0)[bands]
        loud = {other for other in range(4) if levels[other] > levels[index] - 1.5}  # 6 dB are 0.69 in the logarithm
        for other in loud - {index}:
            assert not set(clips[data.clips[other].name]["sounding"]) & set(clips[clip.name]["visible"])
            assert float(levels[index] - levels[other]) == pytest.approx(0.69, abs=0.35)
            mixed += 1
        assert index in loud and len(loud) <= 2
        assert torch.equal(data[index]["masks"], plain[index]["masks"])
    assert mixed > 1


def test_spec_augment_sets_a_band_of_frames_and_one_of_frequencies_to_silence(drawn: Path, splits: Splits) -> None:
    plain = train(drawn, splits)
    before = plain[0]["log_mel"]
    after = train(drawn, splits, augment={"spec_augment": {"time": 0.5, "frequency": 0.5}})[0]["log_mel"]
    differs = (after != before)[:, 0]  # (T, frames, bands)
    assert torch.equal(after[:, 0][differs], torch.full((int(differs.sum()),), float(np.log(0.01))))
    for patch in differs:
        rows, columns = patch.all(1), patch.all(0)
        assert torch.equal(patch, rows[:, None] | columns[None])
        assert rows.sum() <= 48 and columns.sum() <= 32
    assert differs.any()


def test_pictures_and_masks_move_together_and_alike_over_a_clip(own: Path, splits: Splits) -> None:
    plain = train(own, splits)
    square = np.zeros((48, 48, 3), np.uint8)
    square[16:32, 10:30] = 255
    for paths in (plain.clips[0].frames, plain.clips[0].masks):
        for path in paths:
            Image.fromarray(square).save(path)
    white = float(plain[0]["frames"].max())
    sizes = []
    for epoch in range(6):
        data = train(own, splits, augment={"scale": (0.5, 2.0), "crop": True}, flip=True)
        data.set_epoch(epoch)
        item = data[0]
        shown = item["frames"][:, 0] > white / 2
        assert (shown != item["masks"].bool()).float().mean() < 0.04  # bilinear edges
        assert all(torch.equal(item["masks"][0], mask) for mask in item["masks"])
        assert item["masks"].unique().tolist() in ([0, 1], [1])
        sizes.append(int(item["masks"][0].sum()))
    assert min(sizes) < 300 < 340 < max(sizes)


def test_colours_change_alike_and_masks_stay(drawn: Path, splits: Splits) -> None:
    plain = train(drawn, splits)
    item, before = train(drawn, splits, augment={"colour": {"brightness": 0.5}})[0], plain[0]
    assert torch.equal(item["masks"], before["masks"])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    old, new = before["frames"] * std + mean, item["frames"] * std + mean
    inside = (new > 0.02) & (new < 0.98) & (old > 0.02)
    factors = (new / old)[inside]
    assert factors.std() < 0.01 and 0.5 <= float(factors.mean()) <= 1.5 and abs(float(factors.mean()) - 1) > 0.01


def test_single_frames_are_augmented_each_by_itself(own: Path, splits: Splits) -> None:
    write_labels(own, "ms3")
    items = FrameItems(train(own, splits, single_frames=True, augment=EVERYTHING))
    item = items[7]
    assert item["frames"].shape == (1, 3, 48, 48) and item["log_mel"].shape == (1, 1, 96, 64)
    assert item["changed_sound"].shape == (1,) and bool(item["changed_frames"])
    assert len({float(items[index]["frames"].mean()) for index in range(5)}) == 5


def test_mixing_needs_to_know_what_sounds(drawn: Path, splits: Splits) -> None:
    with pytest.raises(DataError, match=r"augment\.mix adds sounds of which nothing is visible.*sound_labels"):
        train(drawn, splits, "ms3", augment={"mix": {"rate": 0.5}}).prepare()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": 3}, "augment.gain is not an option: did you mean 'gain_db'"),
        ({"gain_db": -3}, "augment.gain_db=-3, expected a number from 0 to 60"),
        ({"shift_seconds": 1.0}, "augment.shift_seconds=1.0, expected a number from 0 to 0.9"),
        ({"mix": 0.3}, "augment.mix=0.3: give a dictionary with the keys rate, level_db"),
        ({"mix": {"rate": 0.3, "level_db": 5}}, "augment.mix.level_db=5, expected two numbers"),
        ({"scale": (1.2, 0.8)}, "augment.scale=.*the smaller first"),
        ({"scale": (0, 1)}, "augment.scale=0, expected a number from 0.1 to 10"),
        ({"crop": True}, "augment.crop=True: give True or False, and True together with"),
        ({"spec_augment": {"time": 2}}, "augment.spec_augment.time=2"),
        ({"colour": {"hue": 0.7}}, "augment.colour.hue=0.7, expected a number from 0 to 0.5"),
        ({"colour": {"color": 0.7}}, "augment.colour.color is not an option"),
        ([], "augment=\\[\\]: give a dictionary"),
    ],
)
def test_wrong_options_are_refused_by_name(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augment("MS3Dataset", options)


def test_stored_log_mels_cannot_be_augmented_as_waves(drawn: Path, splits: Splits) -> None:
    with pytest.raises(ConfigError, match="audio='log_mel' reads no wave files"):
        train(drawn, splits, audio="log_mel", augment={"gain_db": 3})
