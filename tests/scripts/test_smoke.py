"""train.sh --smoke: a config's whole way on drawn data, and what it says where something is wrong."""

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import train
from dataloader import build_dataset
from scripts.data.stamps import drawn
from scripts.engine import smoke as smoke_module
from scripts.engine.smoke import Seen, shrink, smoke, without_missing
from tests.runs import write_config
from utils.config import check_classes, load_config
from utils.errors import ConfigError
from utils.runtime import StopRequested, shipped_configs


def report(console: Console) -> str:
    return " ".join(console.export_text().replace("│", " ").split())


@pytest.mark.process
def test_the_whole_way_without_data_or_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that the config names exists, and nothing is left behind."""
    config = write_config(tmp_path / "tiny.py", tmp_path / "nowhere", workers=1)
    config.write_text(config.read_text().replace("weights=None", "weights='nowhere.pth'"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", "ms3", str(config), "--smoke"])
    monkeypatch.chdir(tmp_path)
    assert train.main() == 0
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "random for want of backbone.weights=nowhere.pth" in output
    assert "1 clip of 64 pixels (the config's: 2)" in output and "backbone frozen for the first 1" in output
    assert "equal to the uninterrupted run, bit for bit" in output
    assert "test.sh gives the validation's mIoU" in output
    assert "all is well: this machine trains and tests this config" in output
    assert not list(tmp_path.glob("modat-*")) and not (tmp_path / "work_dir").exists()
    for option in ("--resume", "--overwrite", f"--init-from={config}"):
        monkeypatch.setattr(sys, "argv", ["train.py", "ms3", str(config), "--smoke", option])
        with pytest.raises(ConfigError, match="leave --resume, --overwrite, --init-from out"):
            train.main()


def test_what_goes_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run that draws other numbers, and a test that scores other weights."""
    config = write_config(tmp_path / "tiny.py", tmp_path / "nowhere")
    find = smoke_module.find_resumable

    def drifted(*arguments: Any) -> Any:
        found = find(*arguments)
        assert found is not None
        found[1]["state_dict"]["audio_proj.weight"][0, 0] += 1e-3
        return found

    monkeypatch.setattr(smoke_module, "find_resumable", drifted)
    monkeypatch.setattr(smoke_module, "ROOT", tmp_path)
    (tmp_path / "test.py").write_text("import sys; sys.exit('error: these weights are of another model')")
    console = Console(record=True, width=200, file=(tmp_path / "out").open("w"))
    assert smoke(load_config(config), config, console) == 1
    text = report(console)
    assert "WRONG: resume: weights, optimizer or scores differ from the uninterrupted run's" in text
    assert "WRONG: test: error: these weights are of another model" in text
    assert "all is well" not in text


def test_every_shipped_config_finds_drawn_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their smoke runs read drawn data of their size, and one batch per epoch where clips are whole."""
    made: list[Path] = []

    def draw_small(root: Path, tasks: list[str], **options: Any) -> None:
        made.append(root)
        if not (tmp_path / tasks[0]).is_dir():
            drawn_before(tmp_path / tasks[0], tasks, **{**options, "clips": (2, 1, 1), "size": 32})
        root.symlink_to(tmp_path / tasks[0])

    drawn_before = drawn.draw
    monkeypatch.setattr(drawn, "draw", draw_small)
    for number, path in enumerate(shipped_configs()):
        cfg = load_config(path)
        size, options = cfg.dataset.train.get("img_size"), set(cfg.dataset.train)
        folder = tmp_path / str(number)
        folder.mkdir()
        shrink(cfg, folder, Seen())
        assert cfg.dataset.train.get("img_size") == size and cfg.process.train_epochs == 2
        learned = {"single_frames", "negatives", "augment", "flip", "front_end"} & options
        assert learned <= set(cfg.dataset.train)
        assert cfg.process.freeze_epochs in (0, 1, 2) and "stamps" not in cfg
        for split in ("train", "val", "test"):
            dataset = build_dataset(cfg.dataset[split], where=f"dataset.{split}")
            assert all(str(path).startswith(str(tmp_path)) for clip in dataset.clips for path in clip.frames)
            assert dataset.front_end is build_dataset(cfg.dataset["val"]).front_end
    assert len(made) == len(shipped_configs())


@pytest.mark.parametrize(("gpu", "config", "batch", "clips"), [
    (False, "ms3/MoDAT_pvt2_ms3", 1, 1),
    (True, "ms3/MoDAT_pvt2_ms3", 2, 2),
    (False, "ms3/MoDAT_best_ms3", 2, 2),  # the sounds of other clips
    (False, "ms3/MoDAT_lite0_ms3_stamps", 2, 1),
    (True, "ms3/MoDAT_lite0_ms3_stamps", 10, 2),
    (False, "ms3/MoDAT_best_ms3_stamps", 4, 2),
    (False, "s4/MoDAT_lite0_s4_stamps", 4, 4),  # one labelled frame per clip
])  # fmt: skip
def test_a_batch_is_cut_on_a_cpu_alone(
    gpu: bool, config: str, batch: int, clips: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_clips: list[tuple[int, ...]] = []
    monkeypatch.setattr(smoke_module, "accelerator", lambda: "gpu" if gpu else "cpu")
    monkeypatch.setattr(smoke_module.drawn, "draw", lambda root, tasks, *, clips, size: drawn_clips.append(clips))
    cfg = load_config(f"config/{config}.py")
    shrink(cfg, tmp_path, Seen())
    assert cfg.dataset.train.batch_size == batch and drawn_clips == [(clips, 1, 1)]


def test_a_folder_of_ones_own_is_replaced_by_drawn_data(tmp_path: Path) -> None:
    cfg = load_config("config/ms3/MoDAT_lite0_ms3_folder.py")
    for split in cfg.dataset.values():
        split.update(num_frames=8, img_size=(32, 32), sound_labels="mine.json")
    cfg.model.num_frames = 8
    shrink(cfg, tmp_path, Seen())
    dataset = build_dataset(cfg.dataset["train"])
    assert type(dataset).__name__ == "MS3Dataset" and dataset[0]["frames"].shape == (2, 3, 32, 32)
    check_classes(cfg)

    cfg = load_config("config/avss/MoDAT_pvt2_avss.py")
    for split in cfg.dataset.values():
        split.update(num_classes=9, img_size=(32, 32))
    cfg.model.head.num_classes = 9
    shrink(cfg, tmp_path / "avss", Seen())
    assert len(build_dataset(cfg.dataset["val"]).classes) == 9
    check_classes(cfg)
    cfg.dataset["train"]["num_classes"] = 4
    with pytest.raises(ConfigError, match=r"draws 4 kinds, .* has no room"):
        shrink(cfg, tmp_path / "few", Seen())


def test_weights_on_disk_are_kept(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "there.pth")
    model = {
        "backbone": {"type": "x", "weights": str(tmp_path / "there.pth")},
        "audio_encoder": {"weights": "gone.pth", "pca": True, "pca_weights": "gone too.pth"},
    }
    assert list(without_missing(model)) == ["audio_encoder.weights=gone.pth", "audio_encoder.pca_weights=gone too.pth"]
    assert model["backbone"]["weights"] == str(tmp_path / "there.pth")
    assert model["audio_encoder"] == {"weights": None, "pca": False, "pca_weights": None}


def test_no_room_or_several_processes_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path / "tiny.py", tmp_path)
    monkeypatch.setattr(smoke_module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConfigError, match=r"checkpoints need .* GB, and .*TMPDIR=FOLDER"):
        smoke(load_config(config), config, Console(quiet=True))
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--smoke runs in one process"):
        smoke(load_config(config), config, Console(quiet=True))


def test_a_stopped_smoke_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path / "tiny.py", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(smoke_module, "refuse_broken_data", lambda cfg: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopRequested) as caught:
        smoke(load_config(config), config, Console(quiet=True))
    assert caught.value.saved is None and not list(tmp_path.glob("modat-*"))
    assert signal.getsignal(signal.SIGTERM) is before
