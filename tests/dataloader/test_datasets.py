"""The three layouts: what an item holds, which frames count, and where the sound comes from."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from dataloader import build_dataset
from dataloader.audio import log_mel
from dataloader.palette import decode
from utils.errors import ConfigError, DataError

Splits = Callable[..., dict[str, Any]]
T = {"s4": 5, "ms3": 5, "avss": 10}


@pytest.mark.parametrize("task", ["s4", "ms3", "avss"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_item_keeps_the_contract(drawn: Path, splits: Splits, task: str, split: str) -> None:
    dataset = build_dataset(splits(drawn, task, img_size=(32, 40))[split])
    assert len(dataset) == {"train": 4, "val": 3, "test": 3}[split] == len(dataset.clips)
    assert dataset.task == task and dataset.num_classes == (71 if task == "avss" else 1)
    assert dataset.num_frames == T[task]
    for index in range(len(dataset)):
        item = dataset[index]
        frames = T[task]
        assert item["frames"].shape == (frames, 3, 32, 40) and item["frames"].dtype == torch.float32
        assert item["log_mel"].shape == (frames, 1, 96, 64) and item["log_mel"].dtype == torch.float32
        assert item["masks"].shape == (frames, 32, 40) and item["masks"].dtype == torch.uint8
        for flag in ("gt_temporal_mask_flag", "vid_temporal_mask_flag"):
            assert item[flag].shape == (frames,) and item[flag].dtype == torch.float32
        assert item["name"] == dataset.clips[index].name
        assert int(item["masks"].max()) < max(2, dataset.num_classes)
        unlabelled, padding = item["gt_temporal_mask_flag"] == 0, item["vid_temporal_mask_flag"] == 0
        assert int(item["masks"][unlabelled].sum()) == 0
        assert float(item["frames"][padding].abs().sum()) == float(item["log_mel"][padding].abs().sum()) == 0
        assert not bool((padding & ~unlabelled).any())


@pytest.mark.parametrize(("split", "labelled"), [("train", 1), ("val", 5), ("test", 5)])
def test_s4_labels_only_the_first_training_frame(drawn: Path, splits: Splits, split: str, labelled: int) -> None:
    item = build_dataset(splits(drawn, "s4")[split])[0]
    assert int(item["gt_temporal_mask_flag"].sum()) == labelled
    assert int((item["masks"].flatten(1).sum(1) > 0).sum()) == labelled


@pytest.mark.parametrize(("split", "v1s"), [("train", (5, 1)), ("val", (5, 5)), ("test", (5, 5))])
def test_avss_flags_follow_the_subset(drawn: Path, splits: Splits, split: str, v1s: tuple[int, int]) -> None:
    dataset = build_dataset(splits(drawn, "avss")[split])
    keys = ("vid_temporal_mask_flag", "gt_temporal_mask_flag")
    flags = {item["name"].split("_")[0]: tuple(int(item[key].sum()) for key in keys) for item in dataset}
    assert flags == {"v1s": v1s, "v1m": (5, 5), "v2": (10, 10)}


def test_avss_classes_come_from_the_class_list(drawn: Path, splits: Splits) -> None:
    dataset = build_dataset(splits(drawn, "avss")["train"])
    assert len(dataset.classes) == 71 and dataset.classes[:2] == ["background", "shape-0"]


def test_masks_are_those_on_disk(drawn: Path, splits: Splits) -> None:
    for task in ("ms3", "avss"):
        dataset = build_dataset(splits(drawn, task)["train"])
        for clip, item in zip(dataset.clips, dataset, strict=True):
            for path, mask in zip(clip.masks, item["masks"], strict=False):
                stored = np.asarray(Image.open(path))
                expected = decode(stored) if task == "avss" else (stored > 0)
                assert np.array_equal(mask.numpy(), expected)


def test_the_log_mel_is_that_of_the_wave_file(drawn: Path, splits: Splits) -> None:
    dataset = build_dataset(splits(drawn, "ms3")["train"])
    samples, rate = soundfile.read(dataset.clips[0].wav)
    assert torch.allclose(dataset[0]["log_mel"], log_mel(samples, rate)[:5])


def put_log_mel(clip: Any, value: torch.Tensor) -> None:
    clip.log_mel.parent.mkdir(parents=True, exist_ok=True)
    clip.log_mel.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("task", ["s4", "ms3", "avss"])
def test_audio_says_which_of_two_sounds_is_read(own: Path, splits: Splits, task: str) -> None:
    stored = torch.full((10, 1, 96, 64), 3.0)
    put_log_mel(build_dataset(splits(own, task)["val"]).clips[0], stored)
    means = {
        audio: float(build_dataset(splits(own, task, audio=audio)["val"])[0]["log_mel"][:5].mean())
        for audio in ("auto", "log_mel", "wav")
    }
    assert means["auto"] == means["log_mel"] == 3.0 and means["wav"] < 0


def test_a_log_mel_alone_is_enough(own: Path, splits: Splits) -> None:
    dataset = build_dataset(splits(own, "ms3")["val"])
    put_log_mel(dataset.clips[0], torch.ones(5, 1, 96, 64))
    dataset.clips[0].wav.unlink()
    assert float(dataset[0]["log_mel"].mean()) == 1.0


def test_computed_log_mels_are_kept_beside_the_wave_files(own: Path, splits: Splits) -> None:
    build_dataset(splits(own, "ms3")["val"])[0]
    assert len(list((own / "Multi-sources/ms3_data/log_mel_cache").glob("*.npy"))) == 1


def test_the_cache_folder_can_be_chosen(own: Path, splits: Splits, tmp_path: Path) -> None:
    build_dataset(splits(own, "avss", cache_dir=str(tmp_path / "elsewhere"))["val"])[0]
    assert len(list((tmp_path / "elsewhere").glob("*.npy"))) == 1
    assert not (own / "AVSS/log_mel_cache").exists()


def test_avss_crops_the_centre_in_training_only(own: Path, splits: Splits) -> None:
    for folder in (own / "AVSS").glob("v*/*"):
        for path in [*folder.glob("frames/*.jpg"), *folder.glob("labels_rgb/*.png")]:
            wide = Image.new("RGB", (96, 48))
            wide.paste((128, 0, 0), (24, 0, 72, 48))
            wide.save(path, quality=100, subsampling=0)
    configs = splits(own, "avss", crop_img_and_mask=True, crop_size=48)
    train, val = (build_dataset(configs[split])[0]["masks"][0] for split in ("train", "val"))
    assert train.shape == val.shape == (48, 48)
    assert int(train.min()) == 1  # only the middle of the image
    assert 0.4 < float(val.float().mean()) < 0.6  # all of it


def test_flipping_is_drawn_from_seed_and_epoch_and_turns_frames_and_masks_together(drawn: Path, splits: Splits) -> None:
    config = splits(drawn, "ms3")["train"]
    plain, flipping = build_dataset(config), build_dataset(config, flip=True, seed=1)
    turned = []
    for epoch in range(6):
        flipping.set_epoch(epoch)
        for index in range(len(plain)):
            before, after = plain[index], flipping[index]
            flipped = torch.equal(after["frames"], before["frames"].flip(-1))
            assert flipped or torch.equal(after["frames"], before["frames"])
            assert torch.equal(after["masks"], before["masks"].flip(-1) if flipped else before["masks"])
            turned.append(flipped)
    assert 6 <= sum(turned) <= 18
    flipping.set_epoch(2)
    assert [torch.equal(flipping[i]["frames"], plain[i]["frames"].flip(-1)) for i in range(4)] == turned[8:12]


def test_fewer_frames_a_clip_can_be_asked_for(drawn: Path, splits: Splits) -> None:
    assert build_dataset(splits(drawn, "ms3", num_frames=3)["val"])[0]["frames"].shape[0] == 3
    assert build_dataset(splits(drawn, "avss", num_frames=5)["val"])[2]["frames"].shape[0] == 5
    item = build_dataset(splits(drawn, "ms3", num_labelled_frames=2)["val"])[0]
    assert item["gt_temporal_mask_flag"].tolist() == [1, 1, 0, 0, 0]


def test_an_empty_mask_is_no_error(own: Path, splits: Splits) -> None:
    dataset = build_dataset(splits(own, "ms3")["val"])
    for path in dataset.clips[0].masks:
        Image.new("L", (48, 48)).save(path)
    assert int(dataset[0]["masks"].sum()) == 0


@pytest.mark.parametrize("header", ["video_id,split", "name,split", " name , split ", "\ufeffname,split"])
def test_ms3_tables_as_people_have_them(own: Path, splits: Splits, header: str) -> None:
    table = own / "Multi-sources/ms3_meta_data.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join([header, *lines[1:]]) + "\n", encoding="utf-8")
    assert len(build_dataset(splits(own, "ms3")["val"])) == 3


def test_an_s4_table_without_start_second_is_read(own: Path, splits: Splits) -> None:
    table = own / "Single-source/s4_meta_data.csv"
    rows = [line.split(",") for line in table.read_text().splitlines()]
    table.write_text("\n".join(",".join((row[0], *row[2:])) for row in rows) + "\n")
    assert len(build_dataset(splits(own, "s4")["val"])) == 3


def test_avss_lines_with_other_labels_are_no_clips(own: Path, splits: Splits) -> None:
    with (own / "AVSS/metadata.csv").open("a") as table:
        table.write("some_uid,val,v3\n")
    assert len(build_dataset(splits(own, "avss")["val"])) == 3


def test_a_data_folder_behind_a_link_is_fine(own: Path, splits: Splits, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(own)
    assert build_dataset(splits(tmp_path / "link", "s4")["val"])[0]["frames"].shape == (5, 3, 48, 48)


def test_one_bad_clip_does_not_hide_the_table_s_line(own: Path, splits: Splits) -> None:
    dataset = build_dataset(splits(own, "ms3")["val"])
    dataset.clips[1].frames[2].unlink()
    assert dataset[0]["name"] == "stamps_val_00000"
    with pytest.raises(DataError, match=r"ms3_meta_data\.csv line 7: the frame .*val_00001\.mp4_3\.png is missing"):
        dataset[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": "mp3"}, "audio='mp3', expected one of auto, wav, log_mel"),
        ({"img_size": (0, 48)}, r"img_size=\(0, 48\)"),
        ({"img_size": 48}, "img_size=48"),
        ({"img_size": (48, 4.5)}, "img_size"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_frames": 2.5}, "num_frames=2.5"),
        ({"num_labelled_frames": 6}, "num_labelled_frames=6"),
        ({"img_sise": (48, 48)}, "img_sise.*did you mean 'img_size'"),
        ({"type": "S5Dataset"}, "S5Dataset.*S4Dataset"),
    ],
)
def test_a_wrong_setting_is_named(drawn: Path, splits: Splits, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_dataset(splits(drawn, "ms3", **change)["train"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must be a JSON object"),
        ("{", "not readable JSON"),
        ('{"a": "1"}', "must be a JSON object from class names to indices"),
        ('{"a": 71}', "'a' the index 71, but num_classes=71"),
        ('{"a": 1, "b": 1}', "index 1 to 'a' and to 'b'"),
        (None, "label2idx.json is missing"),
    ],
)
def test_a_wrong_class_list_is_named(own: Path, splits: Splits, text: str | None, message: str) -> None:
    path = own / "AVSS/label2idx.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        build_dataset(splits(own, "avss")["train"])


def test_a_class_without_a_name_gets_its_index(own: Path, splits: Splits) -> None:
    (own / "AVSS/label2idx.json").write_text(json.dumps({"background": 0, "cat": 2}))
    assert build_dataset(splits(own, "avss")["train"]).classes[:3] == ["background", "class 1", "cat"]


def test_the_data_can_lie_anywhere(own: Path, splits: Splits, tmp_path: Path) -> None:
    moved = Path(shutil.move(own / "Multi-sources", tmp_path / "with space & $HOME;"))
    shutil.move(moved, own / "Multi-sources")
    weird = own / "a b; $(touch x)"
    (own / "AVSS").rename(own / "tmp")
    weird.mkdir()
    (own / "tmp").rename(weird / "AVSS")
    assert build_dataset(splits(weird, "avss")["val"])[0]["frames"].shape[0] == 10
