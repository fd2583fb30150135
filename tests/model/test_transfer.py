"""A model that starts from another run's weights, and the report of what did not fit."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import train as entry
from model import build_model
from model.checkpoint import save_weights, to_published
from model.transfer import initialise_from
from scripts.engine.run import train
from tests.support import tiny
from utils.errors import CheckpointError, ConfigError

CLASSIFIER = "head.mask_head.classify.weight"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("form", ["ours.pth", "ours.safetensors", "published.pth", "last.ckpt"])
def test_another_number_of_classes_keeps_its_classifier_and_takes_the_rest(form: str, tmp_path: Path) -> None:
    source, target = build_model(tiny({})), build_model(tiny({}, num_classes=71))
    before = target.state_dict()[CLASSIFIER].clone()
    weights = source.state_dict()
    if form == "last.ckpt":
        torch.save({"state_dict": weights, "optimizer": {"state": {}}, "best": {"a": {"epoch": 1}}}, tmp_path / form)
    else:
        save_weights(to_published(weights) if form == "published.pth" else weights, tmp_path / form)
    report = initialise_from(target, tmp_path / form)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before if name == CLASSIFIER else weights[name]), name
    assert report.reshaped == [f"{CLASSIFIER} (1, 4, 1, 1) instead of (71, 4, 1, 1)"]
    assert report.missing == report.left_over == [] and len(report.loaded) == len(weights) - 1
    assert 0.9 < report.share < 1


def test_what_is_missing_and_left_over_is_listed_and_stays(tmp_path: Path) -> None:
    source = build_model(tiny({"query_generator": {"query_init": "learned"}}))
    target = build_model(tiny({"fusion_block": {"num_experts": 3}, "query_generator": {"num_layers": 5}}))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    save_weights(source, tmp_path / "a.pth")
    report = initialise_from(target, tmp_path / "a.pth")
    assert report.left_over == ["head.query_generator.query.weight"]
    assert {name.split(".")[3] for name in report.missing} == {"2", "3", "4"}
    assert all("fusion_block" in line or "layer_mix" in line for line in report.reshaped) and len(report.reshaped) == 9
    after = target.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in report.missing)
    assert all(torch.equal(after[name], source.state_dict()[name]) for name in report.loaded)
    short, full = report.describe().splitlines(), report.describe(names=None)
    assert len(short) == 4 and f"of {len(after)} tensors" in short[0]
    assert short[1].startswith("  9 of another shape, left as they were: ") and short[1].endswith(", and 5 more")
    assert short[3] == "  1 in the file only: head.query_generator.query.weight"
    assert all(name in full for name in report.missing)


@pytest.mark.parametrize("weights", [{}, {"fc.weight": torch.ones(2)}, {"audio_proj.weight": torch.ones(1, 2)}])
def test_a_file_that_gives_nothing_is_refused(weights: dict[str, Any], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "other.pth")
    model = build_model(tiny({}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"none of its {len(weights)} tensors fits .*model.backbone.weights"):
        initialise_from(model, tmp_path / "other.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match="There is no weights file"):
        initialise_from(model, tmp_path / "none.pth")


def test_it_excludes_resume(tmp_path: Path) -> None:
    class Process:
        work_dir = tmp_path

    class Config:
        process = Process

    with pytest.raises(ConfigError, match="--resume and --init-from exclude each other"):
        train(Config, "run", resume=True, init_from="a.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("joined", [False, True])
def test_the_command_line_passes_the_whole_path_also_to_further_processes(
    joined: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.pth").touch()
    monkeypatch.chdir(tmp_path)
    option = ["--init-from=a.pth"] if joined else ["--init-from", "a.pth"]
    monkeypatch.setattr(sys, "argv", ["train.py", "ms3", "config/ms3/MoDAT_pvt2_ms3.py", *option])
    monkeypatch.setattr("train.ensure_data", lambda *_: None)
    seen: dict[str, Any] = {}
    monkeypatch.setattr("scripts.engine.run.train", lambda _cfg, _name, **options: seen.update(options))
    assert entry.main() == 0
    assert seen["init_from"] == str(tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in sys.argv[-1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "ms3", "config/ms3/MoDAT_pvt2_ms3.py", "--init-from", "b.pth"])
    with pytest.raises(ConfigError, match=r"the checkpoint of --init-from b\.pth does not exist"):
        entry.main()
