"""Packed models: the head's weights with their config, completed by pretrained weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from safetensors.torch import load_file, save_file

from model import build_model, load_pretrained
from model.checkpoint import save_weights
from model.packed import load_checkpoint, metadata, pack, packed_classes
from scripts.pack_weights import main
from scripts.prediction import load_for_prediction
from tests.support import example, tiny
from utils.config import load_config
from utils.errors import CheckpointError, ConfigError


@pytest.fixture
def cfg(tmp_path: Path) -> Any:
    """A config whose backbone and audio encoder have weights files and stay frozen."""
    model = tiny({})
    model["audio_encoder"]["frozen"] = True
    parts = build_model(model)
    save_weights(parts.backbone.network, tmp_path / "backbone.pth")
    save_weights(parts.audio_encoder, tmp_path / "audio.pth")
    model["backbone"]["weights"] = str(tmp_path / "backbone.pth")
    model["audio_encoder"]["weights"] = str(tmp_path / "audio.pth")
    return Config(dict(task="ms3", model=model, process=dict(freeze_epochs=4, train_epochs=4)))


def trained(cfg: Any) -> Any:
    model = build_model(cfg.model)
    load_pretrained(model, cfg.model)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    log_mel, frames = example(2)
    with torch.no_grad():
        return model.eval()(log_mel, frames).logits


def test_round_trip_is_exact_and_small(cfg: Any, tmp_path: Path) -> None:
    model, path = trained(cfg), tmp_path / "packed.safetensors"
    assert pack(model, cfg, path, {"test": {"miou": 0.5}}) == ["backbone", "audio_encoder"]
    assert not any(name.startswith(("backbone.", "audio_encoder.")) for name in load_file(path))
    found = metadata(path)
    assert found is not None
    assert found["task"] == "ms3" and found["scores"] == {"test": {"miou": 0.5}}
    assert found["config"] == json.loads(json.dumps(cfg.to_dict()))

    torch.manual_seed(1)
    other = build_model(cfg.model)
    load_checkpoint(other, cfg.model, path)
    assert torch.equal(logits(other), logits(model))


def test_whole_packed_models_need_no_pretrained_weights(cfg: Any, tmp_path: Path) -> None:
    model, path = trained(cfg), tmp_path / "packed.safetensors"
    assert pack(model, cfg, path, {}, classes=["background", "owl"], whole=True) == []
    assert packed_classes(path) == ["background", "owl"]
    (tmp_path / "backbone.pth").unlink()
    torch.manual_seed(1)
    other = build_model(cfg.model)
    load_checkpoint(other, cfg.model, path)
    assert torch.equal(logits(other), logits(model))


def test_whole_weights_still_load(cfg: Any, tmp_path: Path) -> None:
    model, path = trained(cfg), tmp_path / "whole.safetensors"
    save_weights(model, path)
    assert metadata(path) is None
    other = build_model(cfg.model)
    load_checkpoint(other, cfg.model, path)
    assert torch.equal(logits(other), logits(model))


def test_another_pretrained_part_is_refused(cfg: Any, tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    pack(trained(cfg), cfg, path, {})
    save_weights(build_model(cfg.model).backbone.network, tmp_path / "backbone.pth")  # other random weights
    with pytest.raises(CheckpointError, match="was trained on another backbone"):
        load_checkpoint(build_model(cfg.model), cfg.model, path)


def test_what_cannot_be_packed(cfg: Any, tmp_path: Path) -> None:
    model = trained(cfg)
    with pytest.raises(ConfigError, match=r"is a \.safetensors file"):
        pack(model, cfg, tmp_path / "packed.pth", {})
    cfg.process.freeze_epochs = 1
    assert pack(model, cfg, tmp_path / "audio_only.safetensors", {}) == ["audio_encoder"]
    cfg.model.audio_encoder.pop("weights")
    with pytest.raises(ConfigError, match="nothing to leave out"):
        pack(model, cfg, tmp_path / "packed.safetensors", {})


def test_damaged_metadata_is_named(cfg: Any, tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    pack(trained(cfg), cfg, path, {})
    tensors = load_file(path)
    save_file(tensors, path, metadata={"format": "modat-packed-1", "config": "{", "left_out": "{}", "scores": "{}"})
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(build_model(cfg.model), cfg.model, path)
    whole = {"format": "modat-packed-1", "config": "{}", "left_out": json.dumps({"__class__": "0"}), "scores": "{}"}
    save_file(tensors, path, metadata=whole)
    with pytest.raises(CheckpointError, match="no part of a model"):
        load_checkpoint(build_model(cfg.model), cfg.model, path)


@pytest.mark.parametrize("path", sorted(Path("model/packed").glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_models_fit_their_configs(path: Path) -> None:
    found = metadata(path)
    assert found is not None and found["scores"]["test"]["miou"] > 0.7
    assert path.stat().st_size < 12e6
    expected = build_model(found["config"]["model"]).state_dict()
    prefixes = tuple(f"{part}." for part in found["left_out"])
    own = {name: tensor.shape for name, tensor in expected.items() if not name.startswith(prefixes)}
    assert own == {name: tensor.shape for name, tensor in load_file(path).items()}


def test_command_packs_a_run_with_its_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "small.py"
    base = Path("config/ms3/MoDAT_pvt2_b0_ms3_stamps_scratch.py").resolve()
    config.write_text(
        f"_base_ = [{str(base)!r}]\n"
        f"model = dict(audio_encoder=dict(frozen=True, weights={str(tmp_path / 'audio.pth')!r}))\n"
    )
    model = build_model(load_config(config).model)
    save_weights(model.audio_encoder, tmp_path / "audio.pth")
    save_weights(model, tmp_path / "MS3_best.pth")
    (tmp_path / "test_metrics.json").write_text(json.dumps({"miou": 0.75, "config": "/somewhere", "clips": 3}))
    target = tmp_path / "packed.safetensors"
    assert main([str(config), str(tmp_path / "MS3_best.pth"), str(target)]) == 0
    assert "left out: audio_encoder" in capsys.readouterr().out
    found = metadata(target)
    assert found is not None and found["scores"] == {"test": {"miou": 0.75, "clips": 3}}
    assert main([str(config), str(tmp_path / "nothing.pth"), str(target)]) == 2
    assert "nothing.pth does not exist" in capsys.readouterr().err


def test_command_writes_a_model_folder_with_class_names(
    cfg: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "classes.json"
    table.write_text(json.dumps({"background": 0, "owl": 1, "bell": 2}))
    config = tmp_path / "small.py"
    config.write_text(
        f"_base_ = [{str(Path('config/avss/MoDAT_pvt2_avss.py').resolve())!r}]\n"
        f"model = dict(_delete_=True, **{tiny({}, backbone='resnet10t', num_classes=3)!r})\n"
        f"dataset = dict(test=dict(label_idx_path={str(table)!r}, num_classes=3))\n"
    )
    save_weights(build_model(load_config(config).model), tmp_path / "AVSS_best.pth")
    assert main([str(config), str(tmp_path / "AVSS_best.pth"), str(tmp_path / "folder"), "--whole"]) == 0
    assert "left out: nothing" in capsys.readouterr().out
    assert packed_classes(tmp_path / "folder" / "model.safetensors") == ["background", "owl", "bell"]
    assert load_for_prediction(tmp_path / "folder").classes == ["background", "owl", "bell"]
