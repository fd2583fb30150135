"""Negative clips: how often, with which sound, and the same again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dataloader import AudioVisualDataset, build_dataset
from dataloader.audio_ablation import silence
from dataloader.data_module import DataModule
from dataloader.frame_items import FrameItems
from dataloader.negatives import NOISES, fixed_noise
from model.criterion import SegmentationLoss
from scripts.engine.empty_masks import unlearnable_negatives
from tests.dataloader.test_off_screen import write_labels
from utils.config import load_config
from utils.errors import ConfigError
from utils.runtime import shipped_configs

Splits = Callable[..., dict[str, Any]]


def train(root: Path, splits: Splits, task: str = "ms3", **more: Any) -> AudioVisualDataset:
    return build_dataset({**splits(root, task)["train"], **more})


def only(kind: str) -> dict[str, float]:
    return {"rate": 1.0, **{each: float(each == kind) for each in ("silence", "noise", "off_screen")}}


@pytest.mark.parametrize(("task", "front_end"), [("s4", "vggish"), ("ms3", "aisfx"), ("avss", "vggish")])
def test_a_negative_clip_has_a_replaced_sound_and_empty_masks(
    own: Path, splits: Splits, task: str, front_end: str
) -> None:
    labels = write_labels(own, task)["clips"]
    plain = train(own, splits, task, front_end=front_end)
    sounds = {clip.name: plain.read_log_mel(clip) for clip in plain.clips}
    frames = plain.num_frames
    noises = [fixed_noise(plain.front_end, frames, 0, turn) for turn in range(NOISES)]
    for kind in ("silence", "noise", "off_screen"):
        negative = train(own, splits, task, front_end=front_end, negatives=only(kind))
        for index, clip in enumerate(plain.clips):
            item, before, real = negative[index], plain[index], len(clip.frames)
            assert not item["masks"].any() and torch.equal(item["frames"], before["frames"])
            assert torch.equal(item["gt_temporal_mask_flag"], before["gt_temporal_mask_flag"])
            heard = item["log_mel"][:real]
            assert not item["log_mel"][real:].any()
            if kind == "off_screen":
                donors = [
                    name
                    for name, sound in sounds.items()
                    if torch.equal(heard, sound[torch.arange(real) % len(sound)])
                    and not set(labels[name]["sounding"]) & set(labels[clip.name]["visible"])
                ]
                assert donors or torch.equal(heard, silence(plain.front_end, real))
            else:
                known = [silence(plain.front_end, frames)] if kind == "silence" else noises
                assert any(torch.equal(heard, sound[:real]) for sound in known)


def negative(items: Any, epoch: int) -> list[bool]:
    items.set_epoch(epoch)
    return [not items[index]["masks"].any() for index in range(len(items))]


def test_the_rate_is_kept_and_draws_depend_on_seed_epoch_and_item_alone(drawn: Path, splits: Splits) -> None:
    data = train(drawn, splits, "s4", negatives={"rate": 0.4}, seed=3)
    found = [negative(data, epoch) for epoch in range(25)]
    share = sum(sum(epoch) for epoch in found) / 100
    assert 0.25 < share < 0.55 and len({str(epoch) for epoch in found}) > 5
    again = train(drawn, splits, "s4", negatives={"rate": 0.4}, seed=3)
    assert [negative(again, epoch) for epoch in (7, 2)] == [found[7], found[2]]
    assert [negative(train(drawn, splits, "s4", negatives={"rate": 0.4}, seed=4), e) for e in range(25)] != found
    assert negative(train(drawn, splits, "s4", negatives={"rate": 0.0}), 0) == [False] * 4


def test_mirrors_are_those_of_a_run_without_negatives(drawn: Path, splits: Splits) -> None:
    plain = train(drawn, splits, flip=True)
    other = train(drawn, splits, flip=True, negatives={"rate": 0.5}, augment={"gain_db": 3.0})
    for epoch in range(3):
        plain.set_epoch(epoch)
        other.set_epoch(epoch)
        assert all(torch.equal(plain[index]["frames"], other[index]["frames"]) for index in range(4))


def test_single_frames_are_negative_each_by_itself(drawn: Path, splits: Splits) -> None:
    data = train(drawn, splits, negatives={"rate": 0.5, "silence": 1, "noise": 0, "off_screen": 0}, single_frames=True)
    items = FrameItems(data)
    quiet = silence(data.front_end, 1)
    replaced = [torch.equal(items[index]["log_mel"], quiet) for index in range(len(items))]
    assert 4 <= sum(replaced) <= 16
    clips = {clip for (clip, _), found in zip(items.frames, replaced, strict=True) if found}
    assert len(clips) > 1
    for (clip, frame), index, found in zip(items.frames, range(len(items)), replaced, strict=True):
        item = items[index]
        assert item["log_mel"].shape == (1, 1, 96, 64)
        if found:
            assert not item["masks"].any()
        else:
            assert torch.equal(item["log_mel"][0], data.read_log_mel(data.clips[clip])[frame])


def test_workers_draw_what_one_process_draws(drawn: Path, splits: Splits) -> None:
    def batches(workers: int) -> list[Tensor]:
        configs = splits(drawn, "s4", batch_size=2)
        configs["train"] |= {"negatives": {"rate": 0.5}, "augment": {"gain_db": 6.0, "scale": (0.8, 1.2)}}
        loader = DataModule({"dataset": configs, "process": {"num_workers": workers, "seed": 1}}).loader(
            "train", shuffle=True
        )
        found = []
        for epoch in range(2):
            loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
            found += [batch[key] for batch in loader for key in ("log_mel", "masks", "frames", "changed_sound")]
        return found

    assert all(torch.equal(one, other) for one, other in zip(batches(0), batches(1), strict=True))


def test_data_without_labels_is_told_of_once(drawn: Path, splits: Splits, capsys: pytest.CaptureFixture[str]) -> None:
    train(drawn, splits, "ms3", negatives={"rate": 0.2}).prepare()
    assert "negatives.off_screen takes any other clip's sound" in capsys.readouterr().err
    train(drawn, splits, "s4", negatives={"rate": 0.2}).prepare()
    train(drawn, splits, "ms3", negatives={"rate": 0.2, "off_screen": 0}).prepare()
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.5}, r"S4Dataset: negatives.rate=1.5, expected a number from 0 to 1"),
        ({}, "negatives lacks the key rate"),
        ({"rate": 0.1, "offscreen": 1}, "negatives.offscreen is not an option: did you mean 'off_screen'"),
        ({"rate": 0.1, "noise": -1}, "negatives.noise=-1, expected a number from 0 up"),
        ({"rate": 0.1, "noise": 0, "silence": 0, "off_screen": 0}, "the sum of silence, noise, off_screen=0"),
        (0.2, "negatives=0.2: give a dictionary with the keys rate"),
        ({"rate": True}, "negatives.rate=True"),
    ],
)
def test_wrong_options_are_refused_by_name(drawn: Path, splits: Splits, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(drawn, splits, "s4", negatives=options)


def test_negatives_are_for_training_alone(drawn: Path, splits: Splits) -> None:
    with pytest.raises(ConfigError, match="negatives is for the split 'train', not for 'val'"):
        build_dataset({**splits(drawn, "s4")["val"], "negatives": {"rate": 0.1}})


@pytest.mark.parametrize(("loss", "told"), [("dice", True), ("bce", False), ("bce_dice", False)])
def test_a_loss_without_a_gradient_in_empty_masks_is_told_of(
    drawn: Path, splits: Splits, loss: str, told: bool
) -> None:
    data = train(drawn, splits, negatives={"rate": 0.1})
    message = unlearnable_negatives(data, SegmentationLoss(1, mask_loss=loss))
    assert (message is not None and "loss.mask_loss='bce_dice'" in message) == told
    assert unlearnable_negatives(train(drawn, splits), SegmentationLoss(1)) is None
    semantic = train(drawn, splits, "avss", negatives={"rate": 0.1})
    assert unlearnable_negatives(semantic, SegmentationLoss(71)) is None


@pytest.mark.parametrize(
    "path", [path for path in shipped_configs() if "_stamps" not in path and "/ablation/" not in path]
)
def test_configs_of_published_models_change_no_clip(path: str) -> None:
    if "_best_" not in path:
        train_cfg = load_config(path).dataset.train
        assert not {"negatives", "augment", "sound_labels"} & set(train_cfg)
