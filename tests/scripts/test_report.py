"""The page that compares runs: what it reads, what it says differs, and that it stands alone."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from dataloader import build_dataset
from scripts.engine.clip_pictures import ClipPictures, Predictions, StoredClips, extremes
from scripts.engine.testing import origin_of_scores, score, write_results
from scripts.report import main
from scripts.reporting.compare import clip_table, config_differences, score_lines
from scripts.reporting.runs import RunFolder, read_config, read_runs
from tests.drawn import dataset_configs
from utils.errors import ConfigError, DataError

CONFIG = """model = dict(type='MoDAT', head=dict(num_queries={queries}, size=(
    3,
    4,
)))
dataset = dict(
    test=dict(img_size=({size}, 48)), train=dict(img_size=({size}, 48)), val=dict(img_size=({size}, 48), flip={flip}))
process = dict(seed=0, train_epochs=2, work_dir='{work_dir}')
task = 'ms3'
"""
LOG = (
    "epoch,step,lr,train_total,val_miou,val_f_score\n0,10,0.001,{loss},,\n0,10,,,{first},0.3\n1,20,0.0005,0.4,0.5,0.6\n"
)


class Paints:
    """Paints the labels of the first `frames` frames of every clip."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def logits(self, batch: Any, first_clip: int) -> Tensor:
        masks = torch.where(batch["masks"] > 0, 9.0, -9.0)
        masks[:, self.frames :] = -9.0
        return masks.flatten(0, 1)[:, None]


def write_run(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True)
    filled = {"queries": 6, "size": 48, "flip": False, "work_dir": folder.parent, "loss": 0.8, "first": 0.25, **values}
    (folder / "config.py").write_text(CONFIG.format(**filled))
    (folder / "metrics.csv").write_text(LOG.format(**filled))
    return folder


@pytest.fixture(scope="module")
def tested(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs that were tested, and one that was not."""
    work_dir = tmp_path_factory.mktemp("runs") / "work_dir"
    write_run(work_dir / "first")
    write_run(work_dir / "<second>", queries=12, size=64, flip=True, first=0.75)
    write_run(work_dir / "untested", queries=12)
    dataset = build_dataset(dataset_configs(drawn, "ms3")["test"], where="dataset.test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scripts.engine.testing.save_sheet", lambda *_, **__: None)  # no part of the page, and slow
        for name, frames in (("first", 5), ("<second>", 2)):
            found = score(Paints(frames), dataset, task="ms3", folder=work_dir / name, title="test")
            header = {"task": "ms3", "split": "test", "origin": origin_of_scores(dataset, "test", None)}
            write_results(work_dir / name / "test_metrics.json", header, found)
    return work_dir


@pytest.fixture
def runs(tested: Path, tmp_path: Path) -> list[Path]:
    """Copies of the three, which a test may change."""
    shutil.copytree(tested, tmp_path / "work_dir")
    return [tmp_path / "work_dir" / name for name in ("first", "<second>", "untested")]


class Page(HTMLParser):
    """Tags that are left open, sources of pictures, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_shows_every_run(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    assert main([*map(str, runs), "--out", str(out), "--clips", "2"]) == 0
    text = out.read_text()
    page = Page(text)
    assert page.open == [] and "<script" not in text
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", re.sub(r'"data:[^"]*"', "", text))
    assert "<second>" in page.text and "num_queries" in page.text  # names are escaped
    assert str(tmp_path) not in text, "pages are given away"
    assert "untested has no scores per clip of the test split" in page.text and "no test yet" in page.text
    assert "2 of 3 clips, those on which the runs differ most first" in page.text
    strips = [source for source in page.sources if source.startswith("data:image/jpeg")]
    assert len(strips) == 2 * (2 + 2)  # frames, label, two predictions
    assert main([*map(str, runs), "--out", str(out), "--clips", "2"]) == 0
    assert out.read_text() == text


def test_a_single_run_is_shown_with_its_worst_clips(runs: list[Path], tmp_path: Path) -> None:
    assert main([str(runs[1]), "--out", str(tmp_path / "one.html")]) == 0
    page = Page((tmp_path / "one.html").read_text())
    assert "the worst first" in page.text and "What differs" not in page.text


def test_keys_that_differ_are_found_and_splits_that_differ_alike_merged(runs: list[Path]) -> None:
    found = dict(config_differences(read_runs(runs[:2])))
    assert found == {
        "model.head.num_queries": ["6", "12"],
        "dataset.*.img_size": ["[48, 48]", "[64, 48]"],
        "dataset.val.flip": ["False", "True"],
    }


def test_folders_of_the_data_are_told_apart_without_their_place() -> None:
    folders = ("/home/a/first", "/home/a/second", "data/third")
    runs = [RunFolder(name, Path(name), {"dataset.test.dir_img": name}, []) for name in folders]
    assert config_differences(runs) == [("dataset.test.dir_img", ["first", "second", "data/third"])]


def test_scores_are_those_of_the_best_epoch_and_of_the_tests(runs: list[Path]) -> None:
    lines = {(line.group, line.label): line for line in score_lines(read_runs(runs))}
    validation = lines["validation, best epoch", "mIoU"]
    assert validation.values == [50.0, 75.0, 50.0] and validation.best == [1]
    assert lines["validation, best epoch", "F over the set"].values == [60.0, 30.0, 60.0]  # of the same epoch
    tested = lines["test", "mIoU"]
    assert tested.values[0] == pytest.approx(100) and tested.values[2] is None and tested.best == [0]


def test_clips_come_by_difference(runs: list[Path]) -> None:
    table = clip_table(read_runs(runs), "test")
    difference = (table[0] - table[1]).abs().to_numpy()
    assert list(table.columns) == [0, 1] and (np.diff(difference) <= 0).all() and difference[0] > 0
    read = read_runs(runs[:2])
    read[1].clips["test"] = pd.Series({str(table.index[0]): 0.5, "another clip": 1.0})
    assert list(clip_table(read, "test").index) == [table.index[0]]  # only clips that both have


def test_the_table_of_four_sounds_marks_the_least_painted(runs: list[Path]) -> None:
    for folder, painted in zip(runs, (0.1, 0.02, 0.02), strict=True):
        sounds = {"own": {"miou": 0.8, "fpr": 0.1}, "silence": {"miou": 0.2, "fpr": painted}}
        found = {"conditions": sounds, "balanced": {"mean": {"miou": 0.7}}}
        (folder / "test_robust.json").write_text(json.dumps(found))
    lines = {line.label: line for line in score_lines(read_runs(runs)) if line.group == "test, four sounds"}
    assert lines["pixels painted on silence"].best == [1, 2]
    assert lines["mIoU, own sound"].best == []  # all equal


def test_other_data_is_stated(runs: list[Path], tmp_path: Path) -> None:
    path = runs[1] / "test_metrics.json"
    found = json.loads(path.read_text())
    found["origin"]["data"]["digest"] = "0"
    path.write_text(json.dumps(found))
    assert main([*map(str, runs), "--out", str(tmp_path / "a.html")]) == 0
    assert "scored on different data" in (tmp_path / "a.html").read_text()


def test_a_config_is_read_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text("a = dict(b=-1, c=[dict(d=None)], **{'e': (1, 2)})\nf = {'g': {'h': True}}\n")
    assert read_config(path)["f.g.h"] is True and read_config(path)["a.b"] == -1
    path.write_text(f"a = open({str(tmp_path / 'made')!r}, 'w')\n")
    with pytest.raises(DataError, match=r"config\.py is not the config that a run writes"):
        read_config(path)
    assert not (tmp_path / "made").exists()


def test_bad_folders_are_named(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for folders, words in (
        ([tmp_path / "nowhere"], "there is no folder"),
        ([tmp_path / "empty"], "holds no run"),
        ([runs[0], runs[0]], "is given twice"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_runs(folders)
    (runs[0] / "test_clips.zip").write_bytes(b"broken")
    out = tmp_path / "out.html"
    assert main([str(runs[0]), "--out", str(out)]) == 2 and not out.exists()
    assert "test_clips.zip holds no pictures of clips" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["a"] * 9)


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / parent / "work_dir/run") for parent in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/work_dir/run", "b/work_dir/run"]


def test_best_typical_and_worst_are_chosen_among_clips_with_an_object() -> None:
    scores = [1.0, 0.1, 0.5, 0.9, float("nan"), 0.6, 0.2]
    with_object = [False, True, True, True, True, True, True]
    assert extremes(scores, with_object, 1) == [("best", 3), ("typical", 2), ("worst", 1)]
    assert extremes([0.5], [True]) == [("best", 0)] and extremes([], []) == []
    assert [index for _, index in extremes([0.3, 0.2, 0.1], [False] * 3)] == [0, 1, 2]


def test_pictures_of_a_clip_come_back_as_they_were(tmp_path: Path) -> None:
    masks = torch.zeros(6, 40, 60, dtype=torch.uint8)
    masks[:, 10:20, 10:30] = 5
    real = torch.tensor([1.0] * 5 + [0.0])
    item = {"name": "a/b", "frames": torch.zeros(6, 3, 40, 60), "masks": masks, "vid_temporal_mask_flag": real}
    item["gt_temporal_mask_flag"] = torch.tensor([1.0] + [0.0] * 5)
    with ClipPictures(tmp_path / "clips.zip", ["background", "dog"]) as pictures:
        pictures.add(item, masks * 2)
    stored = StoredClips(tmp_path / "clips.zip").read("a/b")
    assert stored.seconds == [1, 2, 3, 4, 5] and stored.labelled == [True, False, False, False, False]
    assert stored.frames.shape == (40, 300, 3) and stored.truth.shape == (40, 300)
    assert stored.truth[:, :60].tolist() == masks[0].tolist() and stored.prediction.max() == 10
    with pytest.raises(RuntimeError), ClipPictures(tmp_path / "other.zip", []) as pictures:
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["clips.zip"]  # nothing half-written

    packed = Predictions()
    packed.append(masks)
    assert torch.equal(packed[0], masks)
