"""The preflight: every kind of broken data gets one line that names the file, and nothing else does."""

import csv
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from dataloader import build_dataset, preflight
from dataloader.preflight import check_data, write_clean_tables
from utils.errors import DataError
from utils.runtime import tables

Splits = Callable[..., dict[str, Any]]
MS3 = "Multi-sources/ms3_data"
S4 = "Single-source/s4_data"
NAME = "stamps_val_00001"


def config(root: Path, splits: Splits, task: str = "ms3", **more: Any) -> dict[str, Any]:
    return {"task": task, "dataset": splits(root, task, **more), "process": {"num_workers": 0}}


def check(cfg: dict[str, Any], **options: Any) -> Any:
    return check_data(cfg, progress=False, **options)


def frame(root: Path, number: int = 2) -> Path:
    return root / MS3 / "visual_frames" / NAME / f"{NAME}.mp4_{number}.png"


def mask(root: Path, number: int = 2) -> Path:
    return root / MS3 / "gt_masks/val" / NAME / f"{NAME}_{number}.png"


def wav(root: Path) -> Path:
    return root / MS3 / "audio_wav/val" / f"{NAME}.wav"


def pkl(root: Path, value: Any) -> None:
    path = root / MS3 / "audio_log_mel/val" / f"{NAME}.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))


def cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def image(path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (9, 9, 9)).save(path)


def outside(root: Path, path: Path) -> None:
    secret = root.parent / f"secret{path.suffix}"
    shutil.move(path, secret)
    path.symlink_to(secret)


def circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def short_sound(root: Path) -> None:
    soundfile.write(wav(root), np.zeros(16_000), 16_000)


def endless_sound(root: Path) -> None:
    soundfile.write(wav(root), np.zeros(8_000 * 90), 8_000)


# What is done to a good ms3 data set, the kind of fault, and its message.
BROKEN: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "frame missing": (lambda r: frame(r).unlink(), "frames", r"the frame .*mp4_2\.png is missing"),
    "frame empty": (lambda r: frame(r).write_bytes(b""), "frames", r"mp4_2\.png is neither a PNG nor a JPEG"),
    "frame truncated": (lambda r: cut(frame(r)), "frames", r"mp4_2\.png cannot be read .*damaged or truncated"),
    "frame is a web page": (lambda r: frame(r).write_text("<html>"), "frames", "neither a PNG nor a JPEG"),
    "frame of another size": (lambda r: image(frame(r), (48, 40)), "frames", "different sizes: 48 x 40, 48 x 48"),
    "frame links outside": (lambda r: outside(r, frame(r)), "frames", r"leads to .*secret\.png, outside the data"),
    "frame links to itself": (lambda r: circle(frame(r)), "frames", r"mp4_2\.png"),
    "frame is a folder": (
        lambda r: (frame(r).unlink(), frame(r).mkdir()),
        "frames",
        r"mp4_2\.png cannot be read",
    ),
    "frames' folder missing": (
        lambda r: shutil.rmtree(frame(r).parent),
        "frames",
        rf"the (folder|frame) .*{NAME}.* is missing",
    ),
    "mask missing": (lambda r: mask(r).unlink(), "masks", r"the mask .*_2\.png is missing"),
    "mask truncated": (lambda r: cut(mask(r)), "masks", r"_2\.png cannot be read .*damaged or truncated"),
    "mask of another shape": (
        lambda r: [image(mask(r, number), (96, 48)) for number in range(1, 6)],
        "masks",
        "96 x 48 pixels and its frame 48 x 48, which is another aspect ratio",
    ),
    "mask of another size": (lambda r: image(mask(r), (24, 24)), "masks", "different sizes: 24 x 24, 48 x 48"),
    "masks' folder missing": (
        lambda r: shutil.rmtree(mask(r).parent),
        "masks",
        rf"the (folder|mask) .*{NAME}.* is missing",
    ),
    "mask links outside": (lambda r: outside(r, mask(r)), "masks", r"outside the data in .*gt_masks"),
    "sound missing": (lambda r: wav(r).unlink(), "sound", rf"sound is missing, both .*{NAME}\.pkl and .*{NAME}\.wav"),
    "sound empty": (lambda r: wav(r).write_bytes(b""), "sound", rf"the sound .*{NAME}\.wav cannot be read"),
    "sound is not audio": (lambda r: wav(r).write_text("mp3?"), "sound", rf"{NAME}\.wav cannot be read"),
    "sound truncated": (lambda r: cut(wav(r), 0.3), "sound", rf"{NAME}\.wav"),
    "sound too short": (short_sound, "sound", r"lasts 1\.00 s, but 5 frames need 4\.8"),
    "sound too long": (endless_sound, "sound", "announces 90 s, more than max_seconds=60"),
    "sound links outside": (lambda r: outside(r, wav(r)), "sound", "outside the data in .*audio_wav"),
    "log-mel of another shape": (
        lambda r: pkl(r, torch.zeros(5, 96, 64)),
        "sound",
        r"has shape \(5, 96, 64\), expected \(5, 1, 96, 64\)",
    ),
    "log-mel with fewer windows": (lambda r: pkl(r, torch.zeros(3, 1, 96, 64)), "sound", r"has shape \(3, 1, 96, 64\)"),
    "log-mel with NaN": (lambda r: pkl(r, torch.full((5, 1, 96, 64), torch.nan)), "sound", "not finite"),
    "log-mel of whole numbers": (lambda r: pkl(r, torch.zeros(5, 1, 96, 64).int()), "sound", "holds torch.int32"),
    "log-mel is a dictionary": (lambda r: pkl(r, {}), "sound", "holds a dict, expected a tensor"),
    "log-mel truncated": (lambda r: pkl(r, pickle.dumps(torch.zeros(5, 1, 96, 64))[:999]), "sound", "cannot be read"),
    "log-mel runs code": (lambda r: pkl(r, pickle.dumps(os.getcwd)), "sound", r"names posix\.getcwd"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_data_gets_one_line_with_file_and_table_line(own: Path, splits: Splits, what: str) -> None:
    damage, kind, message = BROKEN[what]
    damage(own)
    cfg = config(own, splits)
    report = check({**cfg, "dataset": {"val": cfg["dataset"]["val"]}})
    assert [(fault.split, fault.clip, fault.kind) for fault in report.faults] == [("val", NAME, kind)]
    line = str(report.faults[0])
    assert "\n" not in line and "ms3_meta_data.csv line 7" in line
    assert re.search(message, line), line
    if what not in ONLY_THE_PREFLIGHT_MINDS:
        with pytest.raises(DataError, match=message):
            build_dataset(cfg["dataset"]["val"])[1]


# Training would resize these; the preflight says that they are odd.
ONLY_THE_PREFLIGHT_MINDS = {"frame of another size", "mask of another size", "mask of another shape"}


@pytest.mark.parametrize("task", ["s4", "ms3", "avss"])
def test_good_data_has_no_faults(drawn: Path, splits: Splits, task: str) -> None:
    report = check(config(drawn, splits, task), remember=False)
    assert report.ok and report.clips == {"train": 4, "val": 3, "test": 3}


def avss_clip(root: Path) -> Path:
    return next((root / "AVSS/v1m").glob("val_*"), root / "AVSS/v1m/v1m_val_00001")


def s4_train(root: Path) -> Path:
    return next((root / S4 / "gt_masks/train").glob("*/*/*_1.png"))


def strange_colour(root: Path) -> None:
    pixels = np.zeros((48, 48, 3), np.uint8)
    pixels[5, 7] = (1, 2, 3)
    Image.fromarray(pixels).save(avss_clip(root) / "labels_rgb/3.png")


@pytest.mark.parametrize(
    ("task", "damage", "kind", "message"),
    [
        (
            "avss",
            strange_colour,
            "masks",
            r"labels_rgb/3\.png has the colour \(1, 2, 3\), which is not in the palette of 71",
        ),
        ("avss", lambda r: (avss_clip(r) / "frames/4.jpg").unlink(), "frames", r"frames/4\.jpg is missing"),
        ("avss", lambda r: cut(avss_clip(r) / "frames/4.jpg", 0.6), "frames", r"frames/4\.jpg cannot be read"),
        ("avss", lambda r: shutil.rmtree(avss_clip(r) / "labels_rgb"), "masks", "labels_rgb is missing"),
        ("avss", lambda r: (avss_clip(r) / "audio.wav").unlink(), "sound", r"audio\.pkl and .*audio\.wav"),
        ("s4", lambda r: s4_train(r).unlink(), "masks", r"_1\.png is missing"),
    ],
)
def test_broken_data_of_the_other_layouts_is_named(
    own: Path, splits: Splits, task: str, damage: Callable[[Path], Any], kind: str, message: str
) -> None:
    damage(own)
    report = check(config(own, splits, task))
    assert [fault.kind for fault in report.faults] == [kind]
    assert re.search(message, str(report.faults[0])), report.faults


def test_avss_masks_beyond_the_labelled_frames_are_not_asked_for(own: Path, splits: Splits) -> None:
    for path in (own / "AVSS/v1s").glob("*_train_*/labels_rgb/[1-9].png"):
        path.unlink()
    assert check(config(own, splits, "avss")).ok


TABLE = "Multi-sources/ms3_meta_data.csv"


def lines(root: Path, *added: str, header: str | None = None, keep: slice = slice(None)) -> None:
    path = root / TABLE
    there = path.read_text().splitlines()
    path.write_text("\n".join([header if header is not None else there[0], *there[1:][keep], *added]) + "\n")


@pytest.mark.parametrize(
    ("damage", "splits_hit", "message"),
    [
        (lambda r: (r / TABLE).unlink(), 3, r"ms3_meta_data\.csv is missing: check the path"),
        (lambda r: (r / TABLE).write_bytes(b"\xff\xfe\x00"), 3, "cannot be read as UTF-8 CSV"),
        (lambda r: (r / TABLE).write_text(""), 3, "no column 'name' or 'video_id'; its first line has: nothing"),
        (lambda r: lines(r, header="id,split"), 3, "no column 'name' or 'video_id'; its first line has: id, split"),
        (lambda r: lines(r, header="name,set"), 3, "no column 'split'; its first line has: name, set"),
        (lambda r: lines(r, keep=slice(4, None)), 1, r"no clip of the split 'train'; it has 'test' \(3\), 'val' \(3\)"),
        (lambda r: lines(r, ",val"), 3, r"csv line 12 has an empty cell in the column name"),
        (lambda r: lines(r, "clip_without_split"), 3, r"csv line 12 has an empty cell in the column split"),
        (lambda r: lines(r, "../../etc,val"), 1, r"line 12: name='\.\./\.\./etc' is not a plain file name"),
        (lambda r: lines(r, "/etc/passwd,val"), 1, r"name='/etc/passwd' is not a plain file name"),
        (lambda r: lines(r, "..,val"), 1, r"name='\.\.' is not a plain file name"),
        (lambda r: lines(r, "a\\b,val"), 1, "is not a plain file name"),
        (lambda r: lines(r, "a" * 300 + ",val"), 1, "is not a plain file name"),
    ],
)
def test_a_broken_table_is_named_for_each_split_it_hits(
    own: Path, splits: Splits, damage: Callable[[Path], Any], splits_hit: int, message: str
) -> None:
    damage(own)
    report = check(config(own, splits))
    faults = [fault for fault in report.faults if fault.kind == "table"]
    assert len(faults) == len(report.faults) == splits_hit
    assert all(re.search(message, str(fault)) for fault in faults), faults


def test_an_avss_table_without_usable_labels_says_what_it_has(own: Path, splits: Splits) -> None:
    (own / "AVSS/metadata.csv").write_text("uid,split,label\na,train,v9\n")
    (fault, *_) = check(config(own, splits, "avss")).faults
    assert "no clip of the split 'train' with the label v1s, v1m, v2" in str(fault) and "v9" in str(fault)


def test_a_path_of_an_avss_table_cannot_leave_the_data(own: Path, splits: Splits) -> None:
    with (own / "AVSS/metadata.csv").open("a") as table:
        table.write("../../..,val,v2\n")
    (fault,) = check(config(own, splits, "avss")).faults
    assert "uid='../../..' is not a plain file name" in str(fault)


def test_a_clip_in_two_splits_and_one_listed_twice(own: Path, splits: Splits) -> None:
    lines(own, "stamps_val_00000,train", "stamps_test_00002,test")
    for tree in ("gt_masks", "audio_wav"):
        for path in (own / MS3 / tree / "val").glob("stamps_val_00000*"):
            target = own / MS3 / tree / "train" / path.name
            shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    texts = [str(fault) for fault in check(config(own, splits)).faults]
    assert len(texts) == 2 and all("ms3_meta_data.csv line" in text for text in texts)
    assert any("stamps_val_00000 is in the splits val and train" in text for text in texts)
    assert any("stamps_test_00002 is listed twice in the split test" in text for text in texts)


def test_every_fault_is_counted_and_the_rest_still_checked(own: Path, splits: Splits) -> None:
    frame(own).unlink()
    cut(mask(own))
    wav(own).unlink()
    next((own / MS3 / "audio_wav/test").glob("*.wav")).write_bytes(b"")
    report = check(config(own, splits))
    assert sorted((fault.split, fault.kind) for fault in report.faults) == [
        ("test", "sound"),
        ("val", "frames"),
        ("val", "masks"),
        ("val", "sound"),
    ]
    cells = [list(column.cells) for column in report.table().columns]
    assert cells[0] == ["train", "val", "test"] and cells[2] == ["0", "1", "1"]


def test_workers_find_the_same(own: Path, splits: Splits) -> None:
    frame(own).unlink()
    mask(own).unlink()
    alone, helped = (check(config(own, splits), workers=count, remember=False) for count in (0, 1))
    assert [str(fault) for fault in alone.faults] == [str(fault) for fault in helped.faults] != []


def test_good_clips_are_remembered_until_a_file_changes(
    own: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(own, splits)
    assert check(cfg).ok
    seen: list[str] = []
    original = preflight.check_clip

    def noting(dataset: Any, clip: Any, split: str) -> Any:
        seen.append(clip.name)
        return original(dataset, clip, split)

    monkeypatch.setattr(preflight, "check_clip", noting)
    assert check(cfg).ok and seen == []
    cut(frame(own))
    assert not check(cfg).ok and seen == [NAME]
    assert not check(cfg).ok and seen == [NAME] * 2
    check(cfg, remember=False)
    assert len(seen) == 12


def test_a_clean_table_leaves_the_bad_clips_out_and_keeps_every_column(own: Path, splits: Splits) -> None:
    table = own / "Single-source/s4_meta_data.csv"
    dataset = build_dataset(splits(own, "s4")["val"])
    dataset.clips[1].frames[0].unlink()
    cfg = config(own, splits, "s4")
    ((path, left_out),) = write_clean_tables(check(cfg), tables(cfg)).items()
    assert path == table.with_name("s4_meta_data.clean.csv") and left_out == [dataset.clips[1].row.line]
    before, after = (list(csv.reader(file.open())) for file in (table, path))
    assert after == [row for number, row in enumerate(before, start=1) if number not in left_out]
    assert check(config(own, splits, "s4", anno_csv=str(path))).ok


def test_a_clip_in_two_splits_leaves_training(own: Path, splits: Splits) -> None:
    lines(own, "stamps_val_00000,train")
    cfg = config(own, splits)
    ((path, left_out),) = write_clean_tables(check(cfg), tables(cfg)).items()
    assert left_out == [12]
    assert "stamps_val_00000,val" in path.read_text()
