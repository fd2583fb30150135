"""Weights files: published and ours, damaged, misfitting and malicious."""

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from model import build_model
from model.checkpoint import (
    is_published,
    load_weights,
    read_state_dict,
    save_weights,
    to_ours,
    to_published,
)
from model.pretrained import load_backbone, load_pca, load_pretrained
from scripts import convert_checkpoint
from tests.support import VARIANTS, tiny
from utils.errors import CheckpointError


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("backbone", ["pvt_v2_b0", "res50"])
@pytest.mark.parametrize("name", ["modat", "attention", "four levels", "channel", "spatial", "repeat"])
def test_translation_to_published_names_and_back_is_exact(name: str, backbone: str) -> None:
    weights = build_model(tiny(VARIANTS[name], backbone)).state_dict()
    published = to_published(weights)
    assert is_published(published) and not is_published(weights)
    assert same(to_ours(published), dict(weights))


@pytest.mark.parametrize(
    "wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {f"module.{k}": v for k, v in w.items()}]
)
def test_a_file_of_either_names_loads(tmp_path: Path, wrap) -> None:  # type: ignore[no-untyped-def]
    source, target = (build_model(tiny(VARIANTS["modat"])) for _ in range(2))
    for rename in (dict, to_published):
        torch.save(wrap(rename(source.state_dict())), tmp_path / "weights.pth")
        torch.nn.init.zeros_(target.audio_proj.weight)
        load_weights(target, tmp_path / "weights.pth")
        assert same(dict(source.state_dict()), dict(target.state_dict()))


def test_unused_published_tensors_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model(tiny(VARIANTS["modat"]))
    weights = to_published(model.state_dict()) | {
        "head.fpn.up1.1.weight": torch.zeros(1),
        "head.attn_fc.0.bias": torch.zeros(1),
        "head.query_generator.early_fusion.conv.0.bias": torch.zeros(1),
    }
    with caplog.at_level(logging.INFO):
        load_weights(model, weights)
    assert len(caplog.records) == 1
    assert "3 tensors that this model does not use: head.fpn.up1.1.weight" in caplog.text


FAULTS = {
    "missing": (lambda w: w.pop("head.mlp.layers.1.weight"), "1 missing: head.mlp.layers.1.weight"),
    "missing expert": (
        lambda w: w.pop("head.fusion_block.channel_attn.experts.experts.2.proj.bias"),
        "1 missing: head.fusion_block.channel_attn.experts.experts.2.proj.bias",
    ),
    "renamed": (
        lambda w: w.update({"head.fc.9.weight": w.pop("head.fc.4.weight")}),
        "1 missing: head.fc.4.weight; 1 left over: head.fc.9.weight",
    ),
    "reshaped": (
        lambda w: w.update({"audio_proj.bias": torch.zeros(7)}),
        r"1 of another shape: audio_proj.bias \(7,\) instead of \(16,\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_published_file_that_does_not_fit_is_refused_as_a_whole(fault: str) -> None:
    change, message = FAULTS[fault]
    model = build_model(tiny(VARIANTS["modat"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor + 1 for name, tensor in to_published(before).items()}
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, weights)
    assert same(before, dict(model.state_dict()))


class Harm:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple:
        """Touch a file."""
        return (Path.touch, (Path("ran"),))


def test_a_file_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1), "b": Harm()}, "harm.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Harm()))
    for name in ("harm.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match=name):
            read_state_dict(name)
    assert not Path("ran").exists()


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "half.pth"
    save_weights({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"half\.pth is damaged"):
        read_state_dict(path)
    with pytest.raises(CheckpointError, match="no weights file"):
        read_state_dict(tmp_path / "absent.pth")
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_state_dict(path)
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        read_state_dict(tmp_path / "x.safetensors")


def test_the_script_converts_between_names_and_formats(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = build_model(tiny(VARIANTS["modat"])).state_dict()
    ours, published, back = tmp_path / "ours.safetensors", tmp_path / "published.pth", tmp_path / "back.pth"
    save_weights(weights, ours)
    assert convert_checkpoint.main([str(ours), str(published), "--to", "published"]) == 0
    extra = read_state_dict(published) | {"head.fpn.up1.1.weight": torch.zeros(1)}
    save_weights(extra, published)
    assert convert_checkpoint.main([str(published), str(back)]) == 0
    assert "1 unused ones left out" in capsys.readouterr().out
    assert same(read_state_dict(back), dict(weights))
    save_weights({"x": torch.zeros(1)}, ours)
    assert convert_checkpoint.main([str(ours), str(back)]) == 2
    assert "is not a checkpoint of MoDAT" in capsys.readouterr().err


@pytest.mark.parametrize("backbone", ["pvt_v2_b0", "res50"])
def test_pretrained_files_as_distributed_load(tmp_path: Path, backbone: str) -> None:
    """Names as in AVSBench's files: without prefix, torchvision's names of ResNet's stages, with classifiers."""
    source = build_model(tiny({}, backbone))
    published = to_published(source.state_dict())
    image = {
        name.removeprefix("backbone.").replace("layer3_1", "layer3").replace("layer4_1", "layer4"): tensor
        for name, tensor in published.items()
        if name.startswith("backbone.")
    }
    audio = {name.removeprefix("vggish."): tensor for name, tensor in published.items() if name.startswith("vggish.")}
    classifier = "fc" if backbone == "res50" else "head"
    torch.save(image | {f"{classifier}.{x}": torch.zeros(1) for x in ("weight", "bias")}, tmp_path / "image.pth")
    torch.save(audio, tmp_path / "audio.pth")
    cfg = tiny({}, backbone)
    cfg["backbone"]["weights"] = tmp_path / "image.pth"
    cfg["audio_encoder"]["weights"] = tmp_path / "audio.pth"
    loaded = build_model(cfg)
    load_pretrained(loaded, cfg)
    for part in ("backbone", "audio_encoder"):
        assert same(dict(getattr(source, part).state_dict()), dict(getattr(loaded, part).state_dict()))
    del image[next(iter(image))]
    torch.save(image, tmp_path / "image.pth")
    with pytest.raises(CheckpointError, match=r"image\.pth does not fit the model: 1 missing"):
        load_pretrained(loaded, cfg)


def test_a_file_of_timm_loads_into_a_feature_extractor(tmp_path: Path) -> None:
    import timm

    whole = timm.create_model("pvt_v2_b0")
    torch.save(whole.state_dict(), tmp_path / "timm.pth")
    backbone = build_model(tiny({})).backbone
    load_backbone(backbone, tmp_path / "timm.pth")
    frames = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone.eval()(frames)[-1], whole.eval().forward_features(frames))


def test_a_resnet_file_without_num_batches_tracked_loads(tmp_path: Path) -> None:
    source, target = (build_model(tiny({}, "res50")).backbone for _ in range(2))
    old = {name: tensor for name, tensor in source.network.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(old, tmp_path / "resnet.pth")
    load_backbone(target, tmp_path / "resnet.pth")
    assert same(dict(source.state_dict()), dict(target.state_dict()))


def test_pca_projects_clips_and_quantises(tmp_path: Path) -> None:
    vectors, means = np.random.default_rng(0).normal(size=(128, 128)) / 12, np.full((128, 1), 0.25)
    torch.save({"pca_eigen_vectors": vectors, "pca_means": means}, tmp_path / "pca.pth")
    cfg = tiny({})
    cfg["audio_encoder"] |= {"pca": True, "pca_weights": tmp_path / "pca.pth"}
    model = build_model(cfg)
    load_pretrained(model, cfg)
    pca = model.audio_encoder.pca
    embedding = torch.randn(3, 128)
    expected = np.clip(vectors @ (embedding.numpy().T - means), -2, 2)
    found = pca(embedding)
    np.testing.assert_allclose(found.numpy(), np.round((expected.T + 2) * 255 / 4), atol=1)
    assert float(found.min()) >= 0 and float(found.max()) <= 255
    with pytest.raises(CheckpointError, match="pca_weights"):
        load_pca(pca, None)
