"""Model folders: config, weights and card; from a folder, a packed file or the hub."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from mmengine.config import Config
from safetensors.torch import load_file

from model import build_model, load_pretrained
from model.checkpoint import save_weights
from model.hub import find_weights, from_pretrained, save_pretrained
from model.packed import packed_classes
from tests.support import example, tiny
from utils.download import DownloadError
from utils.errors import CheckpointError, ConfigError


@pytest.fixture
def cfg(tmp_path: Path) -> Any:
    """A config whose audio encoder has a weights file and stays frozen."""
    model = tiny({}, backbone="resnet10t")
    model["audio_encoder"] |= {"frozen": True, "weights": str(tmp_path / "audio.pth")}
    save_weights(build_model(model).audio_encoder, tmp_path / "audio.pth")
    data = {"train": {"type": "MS3Dataset", "anno_csv": "data/table.csv"}}
    return Config(dict(task="ms3", model=model, dataset=data, process=dict(freeze_epochs=0, train_epochs=4)))


def trained(cfg: Any) -> Any:
    model = build_model(cfg.model)
    load_pretrained(model, cfg.model)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(*example(2)).logits
    return out


def test_what_is_published_names_no_folder_of_this_machine(cfg: Any, tmp_path: Path) -> None:
    cfg.dataset.train.anno_csv = str(tmp_path / "data/table.csv")
    cfg.process.work_dir = tmp_path / "runs"
    model, folder = trained(cfg), tmp_path / "published" / "owl"
    save_pretrained(model, cfg, folder, whole=True, record={"commit": "c", "config": {"work_dir": str(tmp_path)}})
    assert not [path.name for path in folder.iterdir() if str(tmp_path).encode() in path.read_bytes()]
    assert from_pretrained(folder).cfg.dataset.train.anno_csv == "table.csv"
    assert "`table.csv`" in (folder / "README.md").read_text()
    save_pretrained(model, cfg, folder)  # a part left out is read from the file that the config names
    assert from_pretrained(folder).cfg.model.audio_encoder.weights == str(tmp_path / "audio.pth")


@pytest.mark.parametrize("whole", [False, True])
def test_round_trip_is_exact(cfg: Any, tmp_path: Path, whole: bool) -> None:
    model, folder = trained(cfg), tmp_path / "runs" / "owl"
    left_out = save_pretrained(model, cfg, folder, scores={"test": {"miou": 0.5}}, whole=whole)
    assert left_out == ([] if whole else ["audio_encoder"])
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    inside = any(name.startswith("audio_encoder.") for name in load_file(folder / "model.safetensors"))
    assert inside == whole
    if whole:
        (tmp_path / "audio.pth").unlink()  # the folder is complete

    torch.manual_seed(1)
    found, found_cfg = from_pretrained(folder)
    assert not found.training and found_cfg.task == "ms3" and found_cfg.model.embed_dim == 16
    assert torch.equal(logits(found), logits(model))
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


def test_a_model_without_frozen_parts_is_saved_whole(cfg: Any, tmp_path: Path) -> None:
    cfg.model.audio_encoder.pop("weights")
    model = build_model(cfg.model).eval()
    assert save_pretrained(model, cfg, tmp_path / "model") == []
    assert torch.equal(logits(from_pretrained(tmp_path / "model").model), logits(model))


def test_card_names_scores_data_parts_and_licences(cfg: Any, tmp_path: Path) -> None:
    model = trained(cfg)
    cfg.model.backbone.weights = "resnet50"  # of the catalogue
    save_pretrained(model, cfg, tmp_path / "owl", scores={"test": {"miou": 0.5}}, licence="cc-by-4.0", whole=True)
    card = (tmp_path / "owl" / "README.md").read_text()
    assert card.startswith("---\ntags:\n- audio-visual-segmentation\n") and "license: cc-by-4.0\n---\n" in card
    assert "| test | miou | 0.5 |" in card and "`data/table.csv`" in card
    assert (
        "| image backbone resnet10t | backbone res50, ImageNet-1k, `pretrained/resnet50-19c8e357.pth` | yes |" in card
    )
    assert "BSD-3-Clause" in card and "| head | trained | yes | cc-by-4.0 |" in card
    assert 'model = from_pretrained("owl")\npredict(model, "video.mp4")' in card
    assert str(tmp_path) not in card


def test_class_names_travel(cfg: Any, tmp_path: Path) -> None:
    cfg.model.head.num_classes = 3
    model = trained(cfg)
    save_pretrained(model, cfg, tmp_path / "named", classes=["background", "owl", "bell"])
    assert packed_classes(find_weights(tmp_path / "named")) == ["background", "owl", "bell"]
    with pytest.raises(ConfigError, match="classes has 2 names, but the masks have 3"):
        save_pretrained(model, cfg, tmp_path / "other", classes=["background", "owl"])


def test_an_edited_or_incomplete_folder_is_refused(cfg: Any, tmp_path: Path) -> None:
    save_pretrained(trained(cfg), cfg, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task": "s4"}))
    with pytest.raises(CheckpointError, match=r"config\.json differs from the config inside model\.safetensors"):
        from_pretrained(tmp_path / "model")
    config.write_text("{")
    with pytest.raises(CheckpointError, match="is not readable JSON"):
        from_pretrained(tmp_path / "model")
    config.unlink()
    from_pretrained(tmp_path / "model")  # the weights carry it
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        from_pretrained(tmp_path / "model")


def test_plain_weights_and_missing_files_are_refused(cfg: Any, tmp_path: Path) -> None:
    save_weights(trained(cfg), tmp_path / "plain.safetensors")
    with pytest.raises(ConfigError, match="carries no config"):
        from_pretrained(tmp_path / "plain.safetensors")
    with pytest.raises(ConfigError, match="does not exist"):
        from_pretrained(tmp_path / "nothing.safetensors")


def test_hub_names_are_downloaded(cfg: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(trained(cfg), cfg, tmp_path / "cache")
    asked = []

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, sorted(allow_patterns)))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    from_pretrained("someone/owl")
    from_pretrained("someone/owl@v1.0")
    files = ["README.md", "config.json", "model.safetensors"]
    assert asked == [("someone/owl", None, files), ("someone/owl", "v1.0", files)]


def test_an_unreachable_hub_says_how_to_bring_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DownloadError, match=r"someone/owl is no file .*\(no connection\)\. .*hf download"):
        from_pretrained("someone/owl")
