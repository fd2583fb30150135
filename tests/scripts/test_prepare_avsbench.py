"""From each released form of AVSBench to what training reads: the same tensors, and every broken file is named."""

import csv
import hashlib
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import save_file

from dataloader import build_dataset
from dataloader.images import Placement, read_colour_mask
from scripts.data import prepare_avsbench
from scripts.data.avsbench.convert import Settings, bytes_needed
from scripts.data.avsbench.release import find_releases, list_clips
from scripts.data.prepare_avsbench import dataset_config
from tests import avsbench_release as made_up
from tests.runs import ROOT, dataset_cfg
from utils.errors import DataError

Capture = pytest.CaptureFixture[str]
OBJECT_FOLDERS = {"s4": "Single-source", "ms3": "Multi-sources"}


def prepare(source: Path, out: Path, *options: str, size: int | str = 32) -> int:
    return prepare_avsbench.main([str(source), "--out", str(out), "--size", str(size), "--jobs", "1", *options])


def items(cfg: dict[str, Any], **change: Any) -> list[dict[str, Any]]:
    return [item for split in cfg.values() for item in build_dataset({**split, **change})]  # type: ignore[attr-defined]


def of_prepared(out: Path, task: str, size: int = 32, **change: Any) -> list[dict[str, Any]]:
    cfg = dataset_config(task, out, Settings(size=size), {"train", "val", "test"})["dataset"]
    return items(cfg, **change)


def assert_same(left: list[dict[str, Any]], right: list[dict[str, Any]], *keys: str) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        for key in keys or tuple(one):
            assert torch.equal(one[key], other[key]) if key != "name" else one[key] == other[key], key


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "log_mel_cache" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def semantic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untouched AVSBench-semantic; do not change it."""
    return made_up.make_semantic(tmp_path_factory.mktemp("semantic"))


@pytest.fixture(scope="module")
def v1m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with v1m alone."""
    return made_up.make_semantic(tmp_path_factory.mktemp("v1m"), subsets=("v1m",))


@pytest.fixture(scope="module")
def original_size(semantic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AVSBench-semantic as prepared for avss with the option --size original."""
    out = tmp_path_factory.mktemp("original")
    assert prepare(semantic, out, "--task", "avss", size="original") == 0
    return out


@pytest.mark.parametrize("pkl", [False, True], ids=["waves", "pkl"])
@pytest.mark.parametrize("task", ["s4", "ms3"])
def test_items_of_the_object_release_are_those_of_the_raw_tree(task: str, pkl: bool, tmp_path: Path) -> None:
    source = made_up.make_object(tmp_path / "raw", task, pkl=pkl)
    before = digest(source)
    assert prepare(source, tmp_path / "out") == 0
    assert digest(source) == before
    raw = items(dataset_cfg(source, task, img_size=(32, 32)))
    prepared = of_prepared(tmp_path / "out", task)
    assert_same(raw, prepared)
    shutil.rmtree(source)  # nothing of it is read
    assert_same(prepared, of_prepared(tmp_path / "out", task))


def test_semantic_release_of_the_wanted_size_is_read_exactly(
    semantic: Path, original_size: Path, tmp_path: Path
) -> None:
    (tmp_path / "AVSS").symlink_to(semantic / "AVSBench-semantic")
    width, height = made_up.SIZE
    raw = items(dataset_cfg(tmp_path, "avss", img_size=(height, width)))
    prepared = of_prepared(original_size, "avss", img_size=(height, width))
    assert {item["masks"].unique().numel() for item in prepared} > {1}
    assert_same(raw, prepared)


def test_semantic_release_of_another_size_differs_by_the_jpeg_alone(v1m: Path, tmp_path: Path) -> None:
    assert prepare(v1m, tmp_path / "out", "--task", "avss") == 0
    (tmp_path / "AVSS").symlink_to(v1m / "AVSBench-semantic")
    raw = items(dataset_cfg(tmp_path, "avss", img_size=(32, 32)))
    prepared = of_prepared(tmp_path / "out", "avss")
    assert_same(raw, prepared, "log_mel", "masks", "gt_temporal_mask_flag", "vid_temporal_mask_flag", "name")
    worst = max(float((one["frames"] - two["frames"]).abs().mean()) for one, two in zip(raw, prepared, strict=True))
    assert 0 < worst < 0.05  # of about 4 in all


def test_labels_semantic_alone_give_the_same_masks(v1m: Path, tmp_path: Path) -> None:
    alone = made_up.make_semantic(tmp_path / "alone", masks="semantic", subsets=("v1m",))
    assert prepare(alone, tmp_path / "one", "--task", "avss") == 0
    assert prepare(v1m, tmp_path / "two", "--task", "avss") == 0
    assert digest(tmp_path / "one/AVSS") == digest(tmp_path / "two/AVSS")


def test_masks_are_index_pngs_that_show_avss_colours_to_other_code(
    semantic: Path, original_size: Path, tmp_path: Path
) -> None:
    path = next((original_size / "AVSS/v2").glob("v2c3*/labels_rgb/1.png"))
    original = semantic / "AVSBench-semantic" / path.relative_to(original_size / "AVSS")
    with Image.open(path) as image, Image.open(original) as colours:
        assert image.mode == "P"
        assert np.array_equal(image.convert("RGB"), colours.convert("RGB"))
        assert set(np.unique(np.asarray(image))) == {0, 18, 70}
    Image.fromarray(np.full((4, 4), 70, np.uint8)).save(tmp_path / "grey.png")
    assert (read_colour_mask(tmp_path / "grey.png", Placement(4, 4), 71) == 70).all()
    with pytest.raises(DataError, match=r"grey\.png has the class 70, but num_classes=70"):
        read_colour_mask(tmp_path / "grey.png", Placement(4, 4), 70)


@pytest.mark.parametrize(("task", "subset"), [("s4", "v1s"), ("ms3", "v1m")])
def test_v1s_and_v1m_serve_s4_and_ms3(task: str, subset: str, semantic: Path, tmp_path: Path) -> None:
    table = tmp_path / "categories.csv"
    rows = [(f"v1s{name}", 0, made_up.CATEGORY, split) for split, name, _ in made_up.listed()]
    made_up.write_csv(table, [("name", "start_second", "category", "split"), *rows])
    assert prepare(semantic, tmp_path / "out", "--task", task, "--s4-table", str(table)) == 0
    prepared = of_prepared(tmp_path / "out", task)
    (tmp_path / "AVSS").symlink_to(semantic / "AVSBench-semantic")
    raw = [
        item
        for item in items(dataset_cfg(tmp_path, "avss", img_size=(32, 32), num_frames=5))
        if item["name"].startswith(subset)
    ]
    assert [item["name"].rsplit("_", 2)[0] for item in raw] == [item["name"] for item in prepared]
    for item in raw:
        item["masks"] = (item["masks"] > 0).to(torch.uint8)
    assert_same(raw, prepared, "frames", "log_mel", "masks", "gt_temporal_mask_flag")
    with (tmp_path / "out" / OBJECT_FOLDERS[task] / f"{task}_meta_data.csv").open() as file:
        first = next(csv.DictReader(file))
    assert first["split"] == "train"
    assert task == "ms3" or first["category"] == made_up.CATEGORY


@pytest.mark.parametrize("task", ["s4", "ms3", "avss"])
def test_videos_alone_suffice(task: str, tmp_path: Path) -> None:
    source = tmp_path / "raw"
    if task == "avss":
        made_up.make_semantic(source, videos=True, subsets=("v2",))
    else:
        made_up.make_object_videos(source, task)
    assert prepare(source, tmp_path / "out", "--task", task, size="original") == 0
    width, height = made_up.SIZE
    prepared = of_prepared(tmp_path / "out", task, img_size=(height, width))
    number_of = {name: number for _, name, number in made_up.listed()}
    for item in prepared:
        number = number_of[item["name"].removeprefix("v2").rsplit("_", 2)[0] if task == "avss" else item["name"]]
        for second in range(5):  # picture `second` of made_up.clip_video is shown in that second
            wanted = np.asarray(made_up.picture(10 * number + second), np.float32) / 255
            shown = item["frames"][second] * torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
            shown += torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
            assert np.abs(shown.permute(1, 2, 0).numpy() - wanted).mean() < 0.1
        assert item["log_mel"][:5].std() > 0.5
    assert_same(prepared, of_prepared(tmp_path / "out", task, img_size=(height, width), audio="wav"), "log_mel")
    info = soundfile.info(next((tmp_path / "out").rglob("*.wav")))
    assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")  # the rate of the video's sound


@pytest.mark.parametrize(("front_end", "rate"), [("vggish", 16_000), ("aisfx", 44_100)])
def test_every_front_end_hears_what_it_hears_of_the_raw_tree(front_end: str, rate: int, tmp_path: Path) -> None:
    source = made_up.make_object(tmp_path / "raw", "ms3", channels=2, rate=rate)
    for path in (source / MS3 / "audio_wav").rglob("*.wav"):
        if path.stem not in ("-a_b1", "d4"):  # resampling is slow
            made_up.wave(path, 5, 1)
    assert prepare(source, tmp_path / "out") == 0
    for path in (source / MS3 / "audio_wav").rglob("*.wav"):
        assert (tmp_path / "out" / path.relative_to(source)).read_bytes() == path.read_bytes()
    raw = items(dataset_cfg(source, "ms3", img_size=(32, 32), front_end=front_end))
    assert_same(raw, of_prepared(tmp_path / "out", "ms3", front_end=front_end))


def test_waves_of_another_rate_and_log_mels_of_the_original(tmp_path: Path) -> None:
    source = made_up.make_object(tmp_path / "raw", "ms3", channels=2, rate=22_050)
    assert prepare(source, tmp_path / "out", "--sample-rate", "16000") == 0
    info = soundfile.info(tmp_path / "out" / MS3 / "audio_wav/train/c3.wav")
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (16_000, 1, "PCM_16", 80_000)
    raw = items(dataset_cfg(source, "ms3", img_size=(32, 32)))
    assert_same(raw, of_prepared(tmp_path / "out", "ms3"))
    of_waves = of_prepared(tmp_path / "out", "ms3", audio="wav")
    assert all((a["log_mel"] - b["log_mel"]).abs().mean() < 0.01 for a, b in zip(raw, of_waves, strict=True))


def test_pkl_for_other_code(tmp_path: Path) -> None:
    source = made_up.make_object(tmp_path / "raw", "s4")
    assert prepare(source, tmp_path / "out") == 0
    assert not list((tmp_path / "out").rglob("*.pkl"))
    assert prepare(source, tmp_path / "out", "--pkl") == 0
    prepared = of_prepared(tmp_path / "out", "s4")
    pkl = tmp_path / "out/Single-source/s4_data/audio_log_mel/train/dog_barking/clip.2.pkl"
    stored = pickle.loads(pkl.read_bytes()).detach()  # as AVSBench's data loader
    assert torch.equal(stored, next(item["log_mel"] for item in prepared if item["name"] == "clip.2"))


def test_shorter_side_keeps_the_aspect_for_cropped_training(v1m: Path, tmp_path: Path) -> None:
    assert prepare(v1m, tmp_path / "out", "--task", "avss", "--fit", "shorter", size=16) == 0
    with Image.open(next((tmp_path / "out").rglob("0.jpg"))) as image:
        assert image.size == (24, 16)
    (tmp_path / "AVSS").symlink_to(v1m / "AVSBench-semantic")
    crop = {"crop_img_and_mask": True, "crop_size": 16, "img_size": (16, 16)}
    raw = items({"train": dataset_cfg(tmp_path, "avss", **crop)["train"] | crop})
    cfg = dataset_config("avss", tmp_path / "out", Settings(16, "shorter"), {"train"})["dataset"]
    assert_same(raw, items({"train": cfg["train"] | crop}), "masks")


# --- broken releases: what is done to a good one, the clip, and the message ---
NAME = "d4"
MS3 = "Multi-sources/ms3_data"
UID = f"v1m{NAME}_3000_8000"
CLIP = f"AVSBench-semantic/v1m/{UID}"


def frame(root: Path) -> Path:
    return root / MS3 / "visual_frames" / NAME / f"{NAME}.mp4_2.png"


def mask(root: Path) -> Path:
    return root / MS3 / "gt_masks/val" / NAME / f"{NAME}_2.png"


def wav(root: Path) -> Path:
    return root / MS3 / "audio_wav/val" / f"{NAME}.wav"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pkl(root: Path, data: bytes) -> None:
    path = root / MS3 / "audio_log_mel/val" / f"{NAME}.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)


def line(root: Path, text: str) -> None:
    with (root / "Multi-sources/ms3_meta_data.csv").open("a") as file:
        file.write(text)


def paint(path: Path, colour: tuple[int, ...], mode: str = "RGB", size: tuple[int, int] = made_up.SIZE) -> None:
    Image.new(mode, size, colour if len(colour) > 1 else colour[0]).save(path)


def rgb(root: Path, number: int = 2) -> Path:
    return root / CLIP / "labels_rgb" / f"{number}.png"


def as_semantic(root: Path) -> Path:
    """The clip with labels_semantic alone."""
    shutil.rmtree(root / CLIP / "labels_rgb")
    return root / CLIP / "labels_semantic/2.png"


BROKEN_OBJECT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "frame missing": (lambda r: frame(r).unlink(), r"the frame .*d4\.mp4_2\.png is missing"),
    "frame empty": (lambda r: frame(r).write_bytes(b""), r"d4\.mp4_2\.png is neither a PNG nor a JPEG"),
    "frame is a web page": (lambda r: frame(r).write_text("<html>"), r"mp4_2\.png is neither a PNG nor a JPEG"),
    "frame truncated": (lambda r: cut(frame(r)), r"mp4_2\.png cannot be read .*damaged or truncated"),
    "frame of another size": (lambda r: paint(frame(r), (1, 2, 3), size=(40, 30)), "sizes: 40 x 30, 48 x 32"),
    "frames' folder missing": (
        lambda r: shutil.rmtree(frame(r).parent),
        r"the folder .*visual_frames/d4 is missing, and so is a video",
    ),
    "video instead of frames truncated": (
        lambda r: (
            shutil.rmtree(frame(r).parent),
            (r / MS3 / "raw_videos").mkdir(),
            made_up.clip_video(r / MS3 / "raw_videos/d4.mp4", 5, 1),
            cut(r / MS3 / "raw_videos/d4.mp4"),
        ),
        r"d4\.mp4 is not a video or sound that FFmpeg reads, or its header is cut off",
    ),
    "video instead of frames too short": (
        lambda r: (
            shutil.rmtree(frame(r).parent),
            (r / MS3 / "raw_videos").mkdir(),
            made_up.clip_video(r / MS3 / "raw_videos/d4.mp4", 3, 1),
        ),
        r"the video .*d4\.mp4 lasts 3\.00 s, but 5 frames need 5 s",
    ),
    "mask missing": (lambda r: mask(r).unlink(), r"the mask .*d4_2\.png is missing"),
    "mask truncated": (lambda r: cut(mask(r)), r"d4_2\.png cannot be read .*damaged or truncated"),
    "mask of another shape": (lambda r: paint(mask(r), (9,), "L", (32, 32)), r"d4_2\.png has 32 x 32 .*another aspect"),
    "masks' folder missing": (lambda r: shutil.rmtree(mask(r).parent), r"folder .*gt_masks/val/d4 is missing: unpack"),
    "sound missing": (lambda r: wav(r).unlink(), r"sound is missing, both .*d4\.wav and .*d4\.pkl, and so is a video"),
    "sound empty": (lambda r: wav(r).write_bytes(b""), r"the sound .*d4\.wav cannot be read"),
    "sound truncated": (lambda r: cut(wav(r)), r"d4\.wav (lasts 2|is truncated)"),
    "sound too short": (lambda r: made_up.wave(wav(r), 2, 0), r"d4\.wav lasts 2\.00 s, but 5 frames need 4\.8"),
    "sound announces hours": (
        lambda r: wav(r).write_bytes(wav(r).read_bytes()[:40] + b"\xf0\xff\xff\x7f" + wav(r).read_bytes()[44:]),
        r"header of the sound .*d4\.wav announces",
    ),
    "log-mel runs code": (lambda r: pkl(r, b"cos\nsystem\n(S'id'\ntR."), r"d4\.pkl"),
    "log-mel of another shape": (lambda r: pkl(r, pickle.dumps(torch.zeros(5, 64, 96))), r"d4\.pkl has shape"),
    "log-mel not finite": (
        lambda r: pkl(r, pickle.dumps(torch.full((5, 1, 96, 64), torch.nan))),
        r"d4\.pkl holds values that are not finite",
    ),
}
BROKEN_SEMANTIC: dict[str, tuple[Callable[[Path], Any], str]] = {
    "frame missing": (lambda r: (r / CLIP / "frames/3.jpg").unlink(), r"the frame .*frames/3\.jpg is missing"),
    "colour outside the palette": (lambda r: paint(rgb(r), (1, 2, 3)), r"labels_rgb/2\.png has the colour \(1, 2, 3\)"),
    "labels missing": (
        lambda r: [shutil.rmtree(r / CLIP / name) for name in ("labels_rgb", "labels_semantic")],
        "folder .*labels_rgb is missing: unpack the masks",
    ),
    "index above the classes": (
        lambda r: paint(as_semantic(r), (71,), "L"),
        r"labels_semantic/2\.png has the class 71; AVSS has 71 classes",
    ),
    "colours in labels_semantic": (
        lambda r: paint(as_semantic(r), (128, 0, 0)),
        r"labels_semantic/2\.png has the mode RGB",
    ),
}


def assert_only_fault(source: Path, out: Path, task: str, clip: str, message: str, capsys: Capture) -> None:
    assert prepare(source, out, "--task", task) == 1
    printed = capsys.readouterr().out
    faults = [text for text in printed.splitlines() if text.startswith(f"{task} val/")]
    assert len(faults) == 1
    assert faults[0].startswith(f"{task} val/{clip}: ")
    assert re.search(message, faults[0])
    assert re.search(r"(metadata|meta_data)\.csv line \d+", faults[0])
    table = next(out.rglob("*m*ta*data.csv"))
    assert clip not in table.read_text()
    assert len(table.read_text().splitlines()) >= 6  # the good clips went on
    assert (table.parent / "faults.txt").read_text() == faults[0].removeprefix(f"{task} ") + "\n"


@pytest.mark.parametrize("what", BROKEN_OBJECT)
def test_broken_object_release(what: str, tmp_path: Path, capsys: Capture) -> None:
    source = made_up.make_object(tmp_path / "raw", "ms3")
    breaks, message = BROKEN_OBJECT[what]
    breaks(source)
    assert_only_fault(source, tmp_path / "out", "ms3", NAME, message, capsys)


@pytest.mark.parametrize("what", BROKEN_SEMANTIC)
def test_broken_semantic_release(what: str, v1m: Path, tmp_path: Path, capsys: Capture) -> None:
    source = Path(shutil.copytree(v1m, tmp_path / "raw"))
    breaks, message = BROKEN_SEMANTIC[what]
    breaks(source)
    assert_only_fault(source, tmp_path / "out", "avss", UID, message, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d4,val\n", r"val/d4: the clip d4 is listed twice, in lines 5 and 8 of .*ms3_meta_data\.csv"),
        ("../d4,val\n", r"val/\.\./d4: .*line 8: name='\.\./d4' is not a plain file name"),
        ("d5,valid\n", r"valid/d5: .*line 8: the split 'valid' is none of train, val, test"),
    ],
)
def test_broken_lines_leave_the_others(text: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    source = made_up.make_object(tmp_path / "raw", "ms3")
    line(source, text)
    assert prepare(source, tmp_path / "out") == 1
    assert re.search(message, capsys.readouterr().out)
    assert len(of_prepared(tmp_path / "out", "ms3")) == 6


def test_all_broken_clips_are_listed_at_once_and_made_when_repaired(tmp_path: Path, capsys: Capture) -> None:
    source, out = made_up.make_object(tmp_path / "raw", "ms3"), tmp_path / "out"
    good = frame(source).read_bytes()
    frame(source).unlink()
    mask(source).unlink()
    (source / MS3 / "audio_wav/train/c3.wav").write_bytes(b"")
    assert prepare(source, out) == 1
    assert capsys.readouterr().out.count("ms3 val/d4: ") == 2
    table = out / "Multi-sources/ms3_meta_data.csv"
    assert "d4" not in table.read_text()
    assert "c3" not in table.read_text()
    frame(source).write_bytes(good)
    made_up.save(Image.new("L", made_up.SIZE), mask(source))
    made_up.wave(source / MS3 / "audio_wav/train/c3.wav", 5, 2)
    kept = out / MS3 / "visual_frames/f6/f6.mp4_1.png"
    before = kept.stat().st_mtime_ns
    assert prepare(source, out) == 0
    assert kept.stat().st_mtime_ns == before
    assert "(4 from an earlier run)" in capsys.readouterr().out
    assert len(table.read_text().splitlines()) == 7
    assert not (out / "Multi-sources/faults.txt").exists()


TABLES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda p: p.unlink(), r"ms3_meta_data\.csv is missing"),
    "without a column": (lambda p: p.write_text("video_id,set\na,val\n"), "has no column 'split'"),
    "with an empty cell": (lambda p: p.write_text("video_id,split\na,\n"), "line 2 has an empty cell"),
    "not text": (lambda p: p.write_bytes(b"video_id,split\n\xff\xfe,val\n"), "cannot be read as UTF-8 CSV"),
    "empty": (lambda p: p.write_text("video_id,split\n"), "lists no clip of ms3"),
}


@pytest.mark.parametrize("what", TABLES)
def test_broken_tables(what: str, tmp_path: Path, capsys: Capture) -> None:
    source = made_up.make_object(tmp_path / "raw", "ms3")
    breaks, message = TABLES[what]
    breaks(source / "Multi-sources/ms3_meta_data.csv")
    assert prepare(source, tmp_path / "out") == 2
    assert re.search(message, capsys.readouterr().err)


def test_broken_class_list_stops_avss_alone(v1m: Path, tmp_path: Path, capsys: Capture) -> None:
    source = Path(shutil.copytree(v1m, tmp_path / "raw"))
    (source / "AVSBench-semantic/label2idx.json").write_text('{"dog": 99}')
    assert prepare(source, tmp_path / "out", "--task", "avss", "--task", "ms3") == 2
    printed = capsys.readouterr()
    assert "label2idx.json gives 'dog' the index 99, but num_classes=71" in printed.err
    assert "ms3: 6 clips prepared" in printed.out


def refused(source: Path, out: Path, message: str, capsys: Capture, *options: str) -> None:
    assert prepare(source, out, *options) == 2
    assert re.search(message, capsys.readouterr().err)


def test_originals_are_never_written(tmp_path: Path, capsys: Capture) -> None:
    source = made_up.make_object(tmp_path / "raw", "ms3")
    before = digest(source)
    refused(source, source / "prepared", "is inside .*raw, whose files stay as they are", capsys)
    refused(source, source, "is inside", capsys)
    refused(source / "Multi-sources", source, "is where the originals", capsys)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/Multi-sources").symlink_to(source / "Multi-sources")
    refused(source, tmp_path / "linked", "is where the originals", capsys)
    (tmp_path / "other/Multi-sources").mkdir(parents=True)
    (tmp_path / "other/Multi-sources/mine.txt").touch()
    refused(source, tmp_path / "other", "is not empty and was not made by this command", capsys)
    assert digest(source) == before


def test_other_settings_are_not_mixed(tmp_path: Path, capsys: Capture) -> None:
    source = made_up.make_object(tmp_path / "raw", "ms3")
    assert prepare(source, tmp_path / "out") == 0
    assert prepare(source, tmp_path / "out", size=48) == 2
    assert "was made with size=32, and now size=48" in capsys.readouterr().err
    assert prepare(source, tmp_path / "out", "--sample-rate", "16000") == 2
    assert "was made with sample_rate=None, and now sample_rate=16000: give the options" in capsys.readouterr().err


def test_mono_waves_of_the_wanted_rate_are_copied(tmp_path: Path) -> None:
    source = made_up.make_object(tmp_path / "raw", "ms3")
    assert prepare(source, tmp_path / "out", "--sample-rate", "16000") == 0
    assert digest(source / MS3 / "audio_wav") == digest(tmp_path / "out" / MS3 / "audio_wav")


def test_no_release(tmp_path: Path, capsys: Capture) -> None:
    refused(tmp_path / "nowhere", tmp_path / "out", "nowhere is not a folder", capsys)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/v2.zip").touch()
    refused(tmp_path / "packed", tmp_path / "out", r"holds no release of AVSBench.*Unpack v2\.zip first", capsys)
    source = made_up.make_object(tmp_path / "raw", "ms3")
    refused(source, tmp_path / "out", "has no data of avss; it has ms3", capsys, "--task", "avss")


def test_disk_space_is_told_and_what_does_not_fit_is_refused(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = made_up.make_object(tmp_path / "raw", "ms3"), tmp_path / "out"
    assert prepare(source, out, "--dry-run") == 0
    assert re.search(r"ms3: 6 clips in .*, 6 to prepare, about \d MiB\n.*about \d MiB needed", capsys.readouterr().out)
    assert not out.exists()
    monkeypatch.setattr(prepare_avsbench, "free_bytes", lambda folder: 300 * 2**20)
    refused(source, out, r"has 300 MiB free, and about \d\d MiB are needed: make room", capsys, "--size", "1024")
    assert not out.exists()
    monkeypatch.undo()
    assert prepare(source, out) == 0
    clips = list_clips(find_releases(source)["ms3"], out).clips
    needed = sum(bytes_needed(clip, Settings(32)) for clip in clips)
    used = sum(path.stat().st_blocks * 512 for path in (out / MS3).rglob("*") if path.is_file())
    assert used <= needed < 3 * used


def test_full_disk_keeps_finished_clips(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = made_up.make_object(tmp_path / "raw", "ms3"), tmp_path / "out"
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "e5" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(source, out, "cannot be written .No space left on device.; the finished clips are kept", capsys)
    monkeypatch.undo()
    assert prepare(source, out) == 0
    assert "(4 from an earlier run)" in capsys.readouterr().out


def test_damaged_prepared_clips_are_left_out_and_made_anew(tmp_path: Path, capsys: Capture) -> None:
    source, out = made_up.make_object(tmp_path / "raw", "ms3"), tmp_path / "out"
    assert prepare(source, out) == 0
    whole = digest(out)
    cut(mask(out))
    capsys.readouterr()
    assert prepare(source, out) == 1
    assert re.search(r"ms3 val/d4: the mask .*d4_2\.png cannot be read", capsys.readouterr().out)
    assert [item["name"] for item in of_prepared(out, "ms3")] == ["-a_b1", "clip.2", "c3", "e5", "f6"]
    assert prepare(source, out) == 0
    assert "(5 from an earlier run)" in capsys.readouterr().out
    assert digest(out) == whole


def test_faults_are_in_the_tables_order_with_several_processes(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made_up.make_object(tmp_path / "raw", "ms3")
    for name in ("train/clip.2", "val/d4", "test/f6"):
        (source / MS3 / f"audio_wav/{name}.wav").unlink()
    assert prepare(source, tmp_path / "one") == 1
    one = capsys.readouterr().out
    monkeypatch.setattr(prepare_avsbench, "_CHUNK", 1)
    context = multiprocessing.get_context("fork")  # starts faster than spawn
    monkeypatch.setattr(multiprocessing, "get_context", lambda *_: context)
    assert prepare(source, tmp_path / "two", "--jobs", "2") == 1
    assert [line for line in one.splitlines() if line.startswith("ms3 ")] == [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("ms3 ")
    ]
    assert digest(tmp_path / "one/Multi-sources") == digest(tmp_path / "two/Multi-sources")


def test_damaged_safetensors_log_mel_is_named(tmp_path: Path) -> None:
    source = made_up.make_object(tmp_path / "raw", "ms3")
    assert prepare(source, tmp_path / "out") == 0
    stored = tmp_path / "out" / MS3 / "audio_log_mel/train/-a_b1.safetensors"
    cut(stored)
    with pytest.raises(DataError, match=r"the log-mel .*-a_b1\.safetensors cannot be read"):
        of_prepared(tmp_path / "out", "ms3")
    save_file({"mel": torch.zeros(5, 1, 96, 64)}, stored)
    with pytest.raises(DataError, match=r"-a_b1\.safetensors holds mel, not 'log_mel'"):
        of_prepared(tmp_path / "out", "ms3")


@pytest.mark.process
def test_killed_run_continues(tmp_path: Path, capsys: Capture) -> None:
    source, out = made_up.make_semantic(tmp_path / "raw", subsets=("v2",)), tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts/data/prepare_avsbench.py"), str(source)]
    command += ["--out", str(out), "--size", "512", "--task", "avss", "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not list(out.rglob("*.safetensors")) and process.poll() is None:
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(0.5)
    left = len(list(out.rglob("*.safetensors")))
    time.sleep(1)
    assert len(list(out.rglob("*.safetensors"))) == left < 6  # its processes ended with it
    (out / "AVSS/v2").mkdir(exist_ok=True, parents=True)
    (out / "AVSS/v2/.torn.png.abc.part").touch()
    assert prepare(source, out, "--task", "avss", size=512) == 0
    assert "from an earlier run" in capsys.readouterr().out
    assert not list(out.rglob("*.part"))
    assert prepare(source, tmp_path / "whole", "--task", "avss", size=512) == 0
    assert digest(out / "AVSS") == digest(tmp_path / "whole/AVSS")


def test_help_names_the_exit_codes(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        prepare_avsbench.main(["--help"])
    assert "1: some are broken" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        prepare_avsbench.main(["x", "--out", "y", "--size", "small"])
    assert "give 16 to 4096 pixels, or 'original'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare_avsbench.main(["x", "--out", "y", "--sample-rate", "16"])
    assert "--sample-rate 16: give 8000 to 192000 Hz, or leave it out" in capsys.readouterr().err
