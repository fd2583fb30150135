"""The record of a checkpoint's origin: what it holds, where it survives, and what a test says of it."""

import builtins
import importlib.metadata
import io
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict

from dataloader import build_dataset
from dataloader.data_module import DataModule
from model.checkpoint import load_weights, read_record, read_state_dict, save_weights
from model.model_card import model_card
from scripts.engine.provenance import describe_split, differences, git_commit, provenance
from scripts.engine.resume import BestWeights
from scripts.engine.testing import origin_of_scores
from utils.portable import portable
from utils.runtime import ROOT


@pytest.fixture
def record(drawn: Path, splits: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    cfg = ConfigDict(task="ms3", dataset=splits(drawn, "ms3"), process={"seed": 3})
    return provenance(cfg, DataModule(cfg))


def test_it_names_seed_code_versions_and_every_split(record: dict[str, Any]) -> None:
    assert record["task"] == "ms3" and record["seed"] == 3 and record["config"]["dataset"]["train"]["split"] == "train"
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert [record["splits"][name]["clips"] for name in ("train", "val", "test")] == [4, 3, 3]
    assert record["splits"]["test"]["labelled_frames"] == {"5": 3} and record["splits"]["test"]["f_score_batch"] == 2
    assert json.loads(json.dumps(record)) == record


def test_no_folder_of_this_machine_is_recorded(record: dict[str, Any], drawn: Path) -> None:
    assert record["config"]["dataset"]["train"]["anno_csv"] and str(drawn) not in json.dumps(record)
    paths = {"inside": str(ROOT / "data/a.csv"), "elsewhere": [Path("/somewhere/b.csv")], "none": None, "word": "a/b"}
    assert portable(paths) == {"inside": "data/a.csv", "elsewhere": ["b.csv"], "none": None, "word": "a/b"}


def test_a_commit_says_whether_files_were_changed(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    run = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*run, *words], check=True)
    clean = git_commit(tmp_path)
    assert clean is not None and len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{clean} (dirty)"


def test_a_resumed_run_keeps_the_commits_before(drawn: Path, splits: Callable[..., dict[str, Any]]) -> None:
    cfg = ConfigDict(task="ms3", dataset=splits(drawn, "ms3"), process={"seed": 0})
    resumed = provenance(cfg, DataModule(cfg), {"commit": "b", "earlier_commits": ["a"]})
    assert resumed["earlier_commits"] == ["a", "b"]
    assert "earlier_commits" not in provenance(cfg, DataModule(cfg), {"commit": resumed["commit"]})


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_with_a_record_load_as_those_without(tmp_path: Path, record: dict[str, Any], suffix: str) -> None:
    layer = torch.nn.Linear(3, 2)
    for name, kept in (("with", record), ("without", None)):
        save_weights(layer, tmp_path / f"{name}{suffix}", kept)
        assert read_record(tmp_path / f"{name}{suffix}") == kept
        other = torch.nn.Linear(3, 2)
        load_weights(other, tmp_path / f"{name}{suffix}")
        assert torch.equal(other.weight, layer.weight)


def test_files_of_the_best_weights_hold_the_epoch_and_its_scores(tmp_path: Path, record: dict[str, Any]) -> None:
    best = BestWeights(tmp_path, {"best.pth": lambda scores: scores["miou"]}, record)
    best.update({"miou": 0.5}, 4, lambda: {"x": torch.ones(1)}, write=True)
    found = read_record(tmp_path / "best.pth")
    assert found is not None and found["epoch"] == 5 and found["scores"] == {"val": {"miou": 0.5}}
    assert found["splits"] == record["splits"] and list(read_state_dict(tmp_path / "best.pth")) == ["x"]


def test_older_broken_and_foreign_files_have_no_record(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    (tmp_path / "broken.pth").write_bytes(b"weights")
    (tmp_path / "broken.safetensors").write_bytes(b"weights")
    assert [read_record(path) for path in sorted(tmp_path.iterdir())] == [None] * 4


def test_the_digest_follows_files_and_not_their_place(
    own: Path, drawn: Path, splits: Callable[..., dict[str, Any]]
) -> None:
    here, there = (
        describe_split(build_dataset(splits(root, "ms3")["test"], where="dataset.test")) for root in (own, drawn)
    )
    assert here == there
    dataset = build_dataset(splits(own, "ms3")["test"], where="dataset.test")
    mask = dataset.clips[1].masks[2]
    mask.write_bytes(mask.read_bytes() + b" ")
    assert describe_split(dataset)["digest"] != there["digest"]


def test_a_test_on_other_data_or_by_another_convention_says_so_in_a_line_each(
    drawn: Path,
    splits: Callable[..., dict[str, Any]],
    record: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_weights({"x": torch.ones(1)}, tmp_path / "weights.pth", record)
    same = build_dataset(splits(drawn, "ms3")["test"], where="dataset.test")
    origin_of_scores(same, "test", tmp_path / "weights.pth")
    assert capsys.readouterr().err == ""

    other = build_dataset(splits(drawn, "ms3", img_size=(32, 48), num_labelled_frames=1)["test"], where="dataset.test")
    origin = origin_of_scores(other, "test", tmp_path / "weights.pth")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and origin["weights"]["seed"] == 3
    assert "the data of the split test differs" in lines[0]  # fewer masks are read
    assert "labelled frames of the split test: 1 in 3 clips, and 5 in 3 clips" in lines[1]
    assert "image size of the split test: 32 x 48, and 48 x 48" in lines[2]

    origin_of_scores(other, "unseen", tmp_path / "weights.pth")  # a split that the run did not know
    save_weights({"x": torch.ones(1)}, tmp_path / "published.pth")
    origin_of_scores(other, "test", tmp_path / "published.pth")
    assert capsys.readouterr().err == ""


def test_padding_counts_only_where_clips_are_padded(drawn: Path, splits: Callable[..., dict[str, Any]]) -> None:
    dataset = build_dataset(splits(drawn, "avss")["test"], where="dataset.test")
    now = describe_split(dataset)
    assert now["padded_frames"] == "counted as background" and "f_score_batch" not in now
    then = {"splits": {"test": {**now, "padded_frames": "none"}}}
    assert differences(then, now, "test")[0].startswith("padded frames of the split test: counted as background")


def test_the_card_of_a_model_states_its_origin(record: dict[str, Any]) -> None:
    cfg = {"task": "ms3", "model": {"type": "MoDAT"}}
    card = model_card(cfg, name="m", scores={}, record={**record, "epoch": 2})
    assert "## Origin" in card and "Seed 3" in card and record["splits"]["test"]["digest"] in card
    assert "## Origin" not in model_card(cfg, name="m", scores={})


def test_describing_a_split_reads_no_file(
    drawn: Path, splits: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = build_dataset(splits(drawn, "ms3")["train"], where="dataset.train")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file is read")

    for owner, name in ((builtins, "open"), (io, "open"), (os, "open")):
        monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(AssertionError, match="a file is read"):
        dataset.clips[0].frames[0].read_bytes()
    assert describe_split(dataset)["clips"] == 4
