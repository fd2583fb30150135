"""A folder of one's own: the same items as AVSBench's layouts, every task's protocol, and faults that are named."""

import ast
import csv
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

from dataloader import build_dataset, folder
from dataloader.folder import FolderDataset
from dataloader.off_screen import read_sound_labels
from dataloader.preflight import check_data
from model import build_model
from model.criterion import build_criterion
from scripts.engine.task_metrics import TaskMetrics
from tests import avsbench_release as made_up
from tests.runs import ROOT
from tests.support import tiny
from utils.config import load_config
from utils.errors import ConfigError, DataError
from utils.runtime import ensure_data

Splits = Callable[..., dict[str, Any]]
SPLITS = ("train", "val", "test")
SIZE = (32, 48)
COLUMNS = ("name", "split", "video", "audio", "masks", "start", "seconds", "rate", "category")


def write_table(path: Path, *rows: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def masks(folder: Path, count: int, seed: int, *, first: int = 0) -> None:
    for k in range(count):
        made_up.save(made_up.indexed(made_up.classes(seed + k)), folder / f"{first + k}.png")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of 5 seconds with masks; do not change them."""
    root = tmp_path_factory.mktemp("videos")
    for number, _ in enumerate(SPLITS):
        made_up.clip_video(root / f"{number}.mp4", 5, number)
        masks(root / f"masks/{number}", 5, 10 * number + 1)
    write_table(root / "clips.csv", *(row(number, split) for number, split in enumerate(SPLITS)))
    return root


@pytest.fixture
def own_videos(videos: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(videos, tmp_path / "mine", ignore=shutil.ignore_patterns("clip_cache")))


def row(number: int, split: str, **more: object) -> dict[str, object]:
    return {"name": f"clip{number}", "split": split, "video": f"{number}.mp4", "masks": f"masks/{number}", **more}


def dataset(root: Path, split: str = "train", task: str = "ms3", **more: Any) -> FolderDataset:
    return FolderDataset(split, str(root / "clips.csv"), task, img_size=SIZE, **more)


def config(root: Path, task: str = "ms3", **more: Any) -> dict[str, Any]:
    common = {"type": "FolderDataset", "task": task, "anno_csv": str(root / "clips.csv"), "img_size": SIZE, **more}
    return {"dataset": {split: {**common, "split": split} for split in SPLITS}, "process": {"num_workers": 0}}


@pytest.mark.parametrize("task", ["s4", "ms3", "avss"])
def test_items_are_those_of_avsbench_layouts(task: str, drawn: Path, splits: Splits, tmp_path: Path) -> None:
    rows = []
    for split in SPLITS:
        of_layout = build_dataset(splits(drawn, task)[split])
        for clip in of_layout.clips:
            entry = {"name": clip.name, "split": split, "category": "dog"}
            for column, path in {
                "video": clip.frames[0].parent,
                "audio": clip.wav,
                "masks": clip.masks[0].parent,
            }.items():
                entry[column] = str(path.relative_to(drawn))
            rows.append(entry)
    table = write_table(tmp_path / "clips.csv", *rows)
    for split, cfg in splits(drawn, task).items():
        mine = FolderDataset(
            split, str(table), task, root=str(drawn), img_size=cfg["img_size"], cache_dir=str(tmp_path)
        )
        theirs = build_dataset(cfg)
        assert len(mine) == len(theirs) > 0
        for one, other in zip(mine, theirs, strict=True):  # type: ignore[call-overload]
            same_labels = task != "avss" or split != "train" or "v1s" not in one["name"]
            for key in ("frames", "log_mel", "vid_temporal_mask_flag", *(("masks",) if same_labels else ())):
                assert torch.equal(one[key], other[key]), key
            if same_labels:
                assert torch.equal(one["gt_temporal_mask_flag"], other["gt_temporal_mask_flag"])


@pytest.mark.parametrize(("task", "split", "labelled"), [("s4", "train", 1), ("s4", "val", 5), ("ms3", "train", 5)])
def test_protocol_of_the_task(task: str, split: str, labelled: int, videos: Path) -> None:
    item = dataset(videos, split, task)[0]
    assert item["frames"].shape == (5, 3, *SIZE)
    assert item["gt_temporal_mask_flag"].tolist() == [1] * labelled + [0] * (5 - labelled)
    assert item["masks"].unique().tolist() == [0, 1]


def test_a_short_clip_of_avss_is_padded(own_videos: Path) -> None:
    write_table(own_videos / "clips.csv", row(0, "train", seconds=5))
    item = dataset(own_videos, task="avss")[0]
    assert item["vid_temporal_mask_flag"].tolist() == [1] * 5 + [0] * 5
    assert set(item["masks"].unique().tolist()) == {0, 18, 70}
    write_table(own_videos / "clips.csv", row(0, "train"))
    with pytest.raises(DataError, match=r"clips\.csv line 2: .*0\.mp4 lasts 5\.00 s, but 10 frames need 10 s"):
        dataset(own_videos, task="avss")[0]


def test_frames_of_videos_are_avsbenchs(videos: Path) -> None:
    frames = dataset(videos, "test")[0]["frames"]
    for second in range(5):
        wanted = torch.tensor(np.asarray(made_up.picture(20 + second), np.float32)) / 255
        mean, deviation = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        assert (frames[second].permute(1, 2, 0) * deviation + mean - wanted).abs().mean() < 0.1


def test_start_of_a_clip(own_videos: Path) -> None:
    write_table(own_videos / "clips.csv", row(0, "train"), row(0, "val", name="later", start=2, seconds=3))
    whole, later = dataset(own_videos)[0], dataset(own_videos, "val")[0]
    assert torch.equal(later["frames"][:3], whole["frames"][2:])
    assert later["vid_temporal_mask_flag"].tolist() == [1, 1, 1, 0, 0]
    # 2 s are not a whole number of windows of 0.96 s
    assert (later["log_mel"][0] - whole["log_mel"][2]).abs().mean() < (
        later["log_mel"][0] - whole["log_mel"][0]
    ).abs().mean()


def test_videos_are_decoded_once_and_again_when_they_change(own_videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dataset(own_videos)[0]
    decoded = []
    read = folder.read_video_frames
    monkeypatch.setattr(folder, "read_video_frames", lambda *a, **k: decoded.append(a[0]) or read(*a, **k))
    assert torch.equal(dataset(own_videos)[0]["frames"], before["frames"])
    assert not decoded
    made_up.clip_video(own_videos / "0.mp4", 5, 7)
    assert not torch.equal(dataset(own_videos)[0]["frames"], before["frames"])
    assert decoded == [own_videos / "0.mp4"]
    assert not list(own_videos.rglob(".part_*"))


def test_extracted_frames_are_no_larger_than_needed(videos: Path, tmp_path: Path) -> None:
    small = FolderDataset("val", str(videos / "clips.csv"), "ms3", img_size=(16, 16), cache_dir=str(tmp_path))
    assert small[0]["frames"].shape[-2:] == (16, 16)
    with Image.open(next(tmp_path.rglob("0.png"))) as image:
        assert image.size == (24, 16)


def test_dense_frames_are_sampled_as_videos(tmp_path: Path) -> None:
    for index in range(20):
        made_up.save(Image.new("RGB", (48, 32), (index, 0, 0)), tmp_path / f"frames/f_{index:03d}.png")
    masks(tmp_path / "masks", 5, 1, first=1)
    made_up.wave(tmp_path / "a.wav", 5, 0)
    write_table(
        tmp_path / "clips.csv",
        {"name": "a", "split": "train", "video": "frames", "audio": "a.wav", "masks": "masks", "rate": 4},
    )
    chosen = [path.name for path in dataset(tmp_path).clips[0].frames]
    assert chosen == ["f_003.png", "f_007.png", "f_011.png", "f_015.png", "f_019.png"]


def test_frames_may_be_numbered_by_their_times(tmp_path: Path) -> None:
    for index in range(60):
        made_up.save(Image.new("RGB", (48, 32), (index, 0, 0)), tmp_path / f"frames/{round(index * 1000 / 30):05d}.png")
    masks(tmp_path / "masks", 2, 1)
    made_up.wave(tmp_path / "a.wav", 2, 0)
    files = {"video": "frames", "audio": "a.wav", "masks": "masks"}
    write_table(tmp_path / "clips.csv", {"name": "a", "split": "train", "rate": 30, "seconds": 2, **files})
    item = dataset(tmp_path)[0]
    assert item["vid_temporal_mask_flag"].tolist() == [1, 1, 0, 0, 0]
    red = (item["frames"][:2, 0, 0, 0] * 0.229 + 0.485) * 255
    assert red.round().tolist() == [28, 58]


def test_clips_without_masks_are_left_out(own_videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(own_videos / "clips.csv", row(0, "train"), row(1, "train", masks=""), row(2, "val", masks=""))
    assert [clip.name for clip in dataset(own_videos).clips] == ["clip0"]
    assert "1 of 2 clips of the split 'train'" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"all 1 of 1 clips of the split 'val' .*column 'masks'"):
        dataset(own_videos, "val")


def test_categories_serve_off_screen_sounds(own_videos: Path) -> None:
    rows = [row(0, "train", category="dog"), row(1, "train", category="violin")]
    write_table(own_videos / "clips.csv", *rows)
    labels = read_sound_labels(dataset(own_videos, task="s4"))
    assert labels is not None and labels.sounding == [{"dog"}, {"violin"}]
    write_table(own_videos / "clips.csv", rows[0], row(1, "train"))
    assert read_sound_labels(dataset(own_videos, task="s4")) is None


@pytest.mark.parametrize("task", ["s4", "ms3", "avss"])
def test_a_model_learns_and_is_scored_under_each_protocol(task: str, videos: Path, tmp_path: Path) -> None:
    classes = 71 if task == "avss" else 1
    data = FolderDataset(
        "train", str(videos / "clips.csv"), task, img_size=(64, 64), num_frames=5, cache_dir=str(tmp_path)
    )
    batch = torch.utils.data.default_collate([data[0]])
    model = build_model(tiny({}, num_classes=classes, num_frames=5))
    criterion = build_criterion({"type": "SegmentationLoss"}, classes)
    out = model(batch["log_mel"][0], batch["frames"][0])
    criterion(out, batch["masks"][0], batch["gt_temporal_mask_flag"][0])["total"].backward()
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())
    metrics = TaskMetrics(task, classes)
    metrics.update(out.logits.detach(), batch, 0)
    assert 0 <= metrics.scalars()["miou"] <= 1


def test_preflight_finds_good_folders_good_and_remembers(own_videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = check_data(config(own_videos), progress=False)
    assert report.ok and report.task == "ms3" and report.clips == {"train": 1, "val": 1, "test": 1}
    monkeypatch.setattr(folder, "read_binary_mask", lambda *_: pytest.fail("checked again"))
    assert check_data(config(own_videos), progress=False).ok
    monkeypatch.undo()
    (own_videos / "masks/0/2.png").write_bytes(b"")
    assert not check_data(config(own_videos), progress=False).ok


def test_a_clip_that_was_good_is_not_remembered_when_its_folder_has_a_fault(own_videos: Path) -> None:
    assert check_data(config(own_videos, task="s4"), progress=False).ok
    (own_videos / "masks/0/2.png").unlink()  # s4 trains on mask 0 alone, whose file has not changed
    faults = check_data(config(own_videos, task="s4"), progress=False).faults
    assert [fault.clip for fault in faults] == ["clip0"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def mute(root: Path) -> None:
    from tests.videos import make_video

    make_video(root / "1.mp4", size=made_up.SIZE, times=range(0, 5000, 100), codec="mpeg4")


def frames_for(root: Path, count: int = 5, **more: object) -> None:
    for k in range(count):
        made_up.save(made_up.picture(k), root / f"frames/{k}.jpg")
    made_up.wave(root / "a.wav", 5, 0)
    rewrite(root, video="frames", **more)


def rewrite(root: Path, **more: object) -> None:
    write_table(root / "clips.csv", row(0, "train"), row(1, "val", **more), row(2, "test"))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "video missing": (lambda r: (r / "1.mp4").unlink(), r"/1\.mp4 does not exist"),
    "video empty": (lambda r: (r / "1.mp4").write_bytes(b""), r"/1\.mp4 is empty"),
    "video truncated": (lambda r: cut(r / "1.mp4"), r"1\.mp4 is not a video or sound that FFmpeg reads, or its"),
    "video is text": (lambda r: (r / "1.mp4").write_text("#EXTM3U\n/etc/passwd"), r"1\.mp4 is not a video or sound"),
    "video too short": (
        lambda r: made_up.clip_video(r / "1.mp4", 2, 1),
        r"1\.mp4 lasts 2\.00 s, but 5 frames need 5 s",
    ),
    "video without sound": (mute, r"the video .*1\.mp4 has no sound track: give its sound as a wave file"),
    "video outside": (
        lambda r: (
            shutil.move(r / "1.mp4", r.parent / "secret.mp4"),
            (r / "1.mp4").symlink_to(r.parent / "secret.mp4"),
        ),
        r"leads to .*secret\.mp4, outside the data",
    ),
    "audio missing": (lambda r: rewrite(r, audio="no.wav"), r"the sound .*no\.wav is missing"),
    "audio outside": (lambda r: rewrite(r, audio="../x.wav"), r"leads to .*x\.wav, outside the data"),
    "frames without sound": (frames_for, r"frames is a folder of frames: name its sound in the column 'audio'"),
    "too few frames": (
        lambda r: frames_for(r, 3, audio="a.wav"),
        r"the folder .*frames has 3 frames, which at rate=1 are 3 of 5 seconds: add frames, or .*'seconds'",
    ),
    "frame missing": (
        lambda r: (frames_for(r, 6, audio="a.wav"), (r / "frames/2.jpg").unlink()),
        r"the frames in .*frames have the numbers 0, 1, 3, 4, whose steps differ: add what is missing",
    ),
    "picture that is no frame": (
        lambda r: (frames_for(r, 6, audio="a.wav"), shutil.copy(r / "frames/0.jpg", r / "frames/cover.jpg")),
        r"have the numbers -1, 0, 1, whose steps differ: .*remove what is no frame",
    ),
    "no frames": (lambda r: frames_for(r, audio="a.wav", start=50), r"has 5 frames \(PNG, JPEG\), none at 50 s"),
    "slow frames": (lambda r: frames_for(r, audio="a.wav", rate=0.5), r"rate='0\.5' is below one frame per second"),
    "masks missing": (lambda r: shutil.rmtree(r / "masks/1"), r"the folder of masks .*masks/1 is missing"),
    "masks empty": (lambda r: [p.unlink() for p in (r / "masks/1").iterdir()], r"masks .*masks/1 has no PNG"),
    "masks are JPEG": (
        lambda r: [p.rename(p.with_suffix(".jpg")) for p in list((r / "masks/1").iterdir())],
        r"the folder of masks .*masks/1 has no PNG",
    ),
    "masks with a gap": (lambda r: (r / "masks/1/2.png").unlink(), r"have the numbers 0, 1, 3, 4; they belong to the"),
    "mask truncated": (lambda r: cut(r / "masks/1/2.png"), r"the mask .*2\.png cannot be read"),
    "masks of another shape": (
        lambda r: [made_up.save(Image.new("L", (32, 32)), r / f"masks/1/{k}.png") for k in range(5)],
        "another aspect ratio",
    ),
    "start too late": (lambda r: rewrite(r, start=4), r"1\.mp4 lasts 5\.00 s, but 5 frames need 9 s"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders(what: str, own_videos: Path) -> None:
    breaks, message = BROKEN[what]
    breaks(own_videos)
    faults = check_data(config(own_videos), progress=False).faults
    assert len(faults) == 1
    assert str(faults[0]).startswith("val/clip1: ")
    assert re.search(message, str(faults[0]))
    assert re.search(r"clips\.csv line 3", str(faults[0]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0, "train"), row(1, "train", name="clip0")], "line 3: the name 'clip0' occurs twice"),
        ([row(0, "train", start="soon")], r"line 2: start='soon', expected a number of 0 or more"),
        ([row(0, "train", seconds="-1")], r"line 2: seconds='-1', expected a number of 1 or more"),
        ([row(0, "train", name="../x")], r"line 2: name='\.\./x' is not a plain file name"),
        ([row(0, "train", video="")], r"line 2 has an empty cell in the column video"),
        ([row(0, "val")], "has no clip of the split 'train'; it has 'val' .1."),
    ],
)
def test_broken_tables(rows: list[dict[str, object]], message: str, own_videos: Path) -> None:
    write_table(own_videos / "clips.csv", *rows)
    with pytest.raises(DataError, match=message):
        dataset(own_videos)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "ms4"}, "task='ms4', expected one of s4, ms3, avss"),
        ({"audio": "log_mel"}, "reads no stored log-mels: set audio='auto'"),
        ({"num_classes": 3}, "num_classes and label_idx_path are for task='avss'"),
        ({"task": "avss", "num_classes": 1}, "num_classes=1, expected 2 to 255"),
        ({"augment": {}, "split": "val"}, "augment is for the split 'train'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, videos: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        dataset(videos, **options)


def test_cache_that_cannot_be_written_is_named(own_videos: Path) -> None:
    (own_videos / "file").touch()
    broken = dataset(own_videos, cache_dir=str(own_videos / "file/cache"))
    with pytest.raises(DataError, match=r"file/cache cannot be written .*set cache_dir of the data set"):
        broken[0]


def test_the_shipped_config(tmp_path: Path, own_videos: Path) -> None:
    path = Path("config/ms3/MoDAT_lite0_ms3_folder.py")
    tables = [f"dataset.{split}.anno_csv={own_videos / 'clips.csv'}" for split in SPLITS]
    cfg = load_config(path, tables)
    assert cfg.task == "ms3"
    assert len(build_dataset(cfg.dataset.train)) == 1
    tasks = [f"dataset.{split}.task=s4" for split in SPLITS]
    assert load_config(path, [*tables, *tasks], "s4").task == "s4"
    with pytest.raises(ConfigError, match=r"dataset\.train\.task='s5' is not a task"):
        load_config(path, ["dataset.train.task=s5"])
    with pytest.raises(DataError, match=r"mine\.csv is missing: it lists your clips"):
        ensure_data(load_config(path, [f"dataset.train.anno_csv={tmp_path / 'mine.csv'}"]), path)


def test_data_sets_need_no_ffmpeg_until_a_video_is_read() -> None:
    for path in (ROOT / "dataloader").glob("*.py"):
        first = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any(alias.name.split(".")[0] == "av" for node in first for alias in node.names), path
        assert not any(isinstance(node, ast.ImportFrom) and node.module == "av" for node in first), path


def test_videos_sound_is_read_at_its_rate(videos: Path) -> None:
    clip = dataset(videos).clips[0]
    dataset(videos)[0]
    info = soundfile.info(clip.wav)
    assert (info.samplerate, info.channels) == (16_000, 1)
    assert 4.9 < info.duration <= 5.0
