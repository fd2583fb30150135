"""Backbones from timm: four scales from any network, frames of any size, or one sentence that says why not."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from model import build_model
from model.backbones import TimmBackbone
from model.feature_pyramid import FeaturePyramid
from model.pretrained import load_backbone
from tests.support import example, tiny
from utils.errors import CheckpointError, ConfigError

VIT, SWIN, DINOV2 = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "vit_small_patch14_dinov2"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "name",
    ["pvt_v2_b0", "res50", "tf_efficientnet_lite0", "convnext_atto", SWIN, VIT, DINOV2, "vit_small_patch16_dinov3"],
)
def test_the_whole_model_takes_frames_of_no_multiple_of_32(name: str) -> None:
    model = build_model(tiny({}, name)).eval()
    with torch.no_grad():
        out = model(*example(1, 100, 132))
    assert out.logits.shape == (1, 1, 100, 132) and out.logits.isfinite().all()


@pytest.mark.parametrize("name", [VIT, SWIN])
def test_every_parameter_learns_also_with_activation_checkpointing(name: str) -> None:
    cfg = tiny({"fusion_block": {"second_policy_train": "all"}}, name)
    cfg["backbone"]["drop_path_rate"] = 0.0
    model = build_model(cfg).train()
    log_mel, frames = example(2, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_activation_checkpointing(enable)
        model.zero_grad()
        calls: list[int] = []
        block = next(module for key, module in model.backbone.named_modules() if key.endswith("blocks.0"))
        handle = block.register_forward_pre_hook(lambda _module, _inputs, calls=calls: calls.append(1))
        model(log_mel, frames).logits.square().mean().backward()
        handle.remove()
        assert len(calls) == (2 if enable else 1), "recomputed once in the backward pass"
        gradients.append([parameter.grad for parameter in model.parameters()])
    for stored, recomputed in zip(*gradients, strict=True):
        assert stored is not None
        torch.testing.assert_close(stored, recomputed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("stride", "channels"), [(8, (8, 16, 16, 16)), (14, (4, 8, 16, 16)), (16, (4, 8, 16, 16)), (32, (2, 4, 8, 16))]
)
def test_the_pyramid_has_the_sizes_of_the_four_strides(stride: int, channels: tuple[int, ...]) -> None:
    pyramid = FeaturePyramid(16, stride)
    maps = pyramid(torch.randn(2, 16, -(-96 // stride), -(-132 // stride)), (96, 132))
    assert [tuple(x.shape) for x in maps] == [
        (2, channels[0], 24, 33),
        (2, channels[1], 12, 17),
        (2, channels[2], 6, 9),
        (2, channels[3], 3, 5),
    ]
    assert pyramid.channels == channels
    sum(x.sum() for x in maps).backward()
    assert all(parameter.grad is not None for parameter in pyramid.parameters())


def test_the_pyramid_keeps_its_own_scale_and_pools_the_coarser_one() -> None:
    pyramid = FeaturePyramid(8, 16)
    feature = torch.randn(1, 8, 4, 4)
    maps = pyramid(feature, (64, 64))
    normalised = torch.nn.functional.layer_norm(feature.permute(0, 2, 3, 1), (8,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(maps[2], normalised)
    torch.testing.assert_close(maps[3], normalised.unflatten(2, (2, 2)).unflatten(4, (2, 2)).amax((3, 5)))


@pytest.mark.parametrize(("arguments", "words"), [((16, 2), "got stride 2"), ((6, 16), "6 channels cannot be halved")])
def test_a_map_without_a_pyramid_is_named(arguments: tuple[int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FeaturePyramid(*arguments)


def test_a_frozen_backbone_of_one_scale_has_a_pyramid_that_learns() -> None:
    model: Any = build_model(tiny({}, VIT)).train()
    model.freeze_backbone()
    log_mel, frames = example(2, 64, 64)
    maps = model.backbone(frames)
    assert [tuple(x.shape) for x in maps] == [(2, 192, 4, 4)] and not maps[0].requires_grad
    out = model(log_mel, frames, features=maps)  # as from the cache
    torch.testing.assert_close(out.logits.shape, torch.Size((2, 1, 64, 64)))
    out.logits.mean().backward()
    assert all(parameter.grad is not None for parameter in model.neck.parameters())


def test_frames_of_a_patch_14_network_are_resized_to_whole_patches() -> None:
    backbone = TimmBackbone(DINOV2).eval()
    seen: list[tuple[int, ...]] = []
    backbone.network.register_forward_pre_hook(lambda _module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    with torch.no_grad():
        backbone(torch.randn(1, 3, 84, 64))
    assert seen == [(84, 70)] and backbone.stride == 14


def test_maps_with_channels_last_are_told_by_the_network_not_by_their_shape() -> None:
    """At 384 pixels, the finest map of Swin-T is 96 x 96 x 96."""
    backbone = TimmBackbone(SWIN)
    maps = [torch.randn(1, 96 // 2**level, 96 // 2**level, 96 * 2**level) for level in range(4)]
    backbone.network.forward = lambda _frames: maps
    out = backbone(torch.zeros(1, 3, 384, 384))
    assert all(torch.equal(found, given.permute(0, 3, 1, 2)) for found, given in zip(out, maps, strict=True))


@pytest.mark.parametrize("name", ["dla34", "mobilenetv4_conv_small", "mvitv2_tiny"])
def test_networks_with_other_maps_by_default_give_the_four(name: str) -> None:
    backbone = TimmBackbone(name).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (channels, 64 // stride, 96 // stride)
        for channels, stride in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("img_size", [64, (64, 96)])
def test_a_network_of_a_fixed_size_is_built_for_the_frames(img_size: Any) -> None:
    backbone = TimmBackbone("coat_lite_tiny", img_size=img_size).eval()
    size = backbone.options["img_size"]
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, *size))[0].shape[2:] == (size[0] // 4, size[1] // 4)


FAULTS: list[tuple[dict[str, Any], tuple[int, int], str]] = [
    (
        {"name": "coat_lite_tiny"},
        (64, 64),
        r"coat_lite_tiny was built for 224 x 224 frames and got 64 x 64: set model\.backbone\.img_size=\(64,64\), or",
    ),
    (
        {"name": "dla34"},
        (100, 132),
        r"dla34 cannot read frames of 100 x 132: set dataset\.\*\.img_size to multiples of",
    ),
    ({"name": "pvt_v2_b0"}, (66, 64), r"frames of 66 x 64: .* set dataset\.\*\.img_size to multiples of 4"),
    ({"name": "inception_v3"}, (128, 128), "a finest map of 28 x 28 pixels for frames of 128 x 128"),
    ({"name": "levit_128"}, (64, 64), r"'levit_128' has feature maps at strides \[16, 32, 64\]"),
    ({"name": "res50", "img_size": 64}, (64, 64), r"img_size=\(64, 64\): 'res50' has no such option; leave it out"),
    ({"name": SWIN, "img_size": (64, 0)}, (64, 64), r"model\.backbone\.img_size=\(64, 0\): give a number of pixels"),
    ({"name": SWIN, "img_size": "64"}, (64, 64), "model.backbone.img_size='64': give a number of pixels"),
]


@pytest.mark.parametrize(("options", "size", "words"), FAULTS, ids=[f"{x[0]['name']}-{x[1][0]}" for x in FAULTS])
def test_what_does_not_fit_is_one_sentence(options: dict[str, Any], size: tuple[int, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words), torch.no_grad():
        TimmBackbone(**options).eval()(torch.randn(1, 3, *size))


def test_an_error_within_a_network_is_not_blamed_on_the_size() -> None:
    backbone = TimmBackbone("pvt_v2_b0")
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels|Expected.* channels"):
        backbone(torch.randn(1, 4, 64, 64))


@pytest.mark.parametrize("name", [VIT, DINOV2, SWIN, "convnext_atto", "dla34"])
def test_a_whole_networks_file_loads(name: str, tmp_path: Path) -> None:
    whole = timm.create_model(name).state_dict()
    torch.save(whole, tmp_path / "whole.pth")
    backbone = TimmBackbone(name)
    load_backbone(backbone, tmp_path / "whole.pth")
    ours = backbone.network.state_dict()
    assert all(
        torch.equal(tensor, whole[key.removeprefix("model.")]) for key, tensor in ours.items() if "model." in key
    )
    some = next(key for key, tensor in whole.items() if tensor.dim() > 1)
    assert any(torch.equal(tensor, whole[some]) for tensor in ours.values())
    torch.save({**whole, "surprise": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match="left over: surprise"):
        load_backbone(backbone, tmp_path / "more.pth")


@pytest.mark.parametrize("name", ["coat_lite_tiny", VIT])
def test_a_file_is_resampled_for_a_network_that_is_built_for_another_size(name: str, tmp_path: Path) -> None:
    whole = timm.create_model(name).state_dict()
    torch.save(whole, tmp_path / "whole.pth")
    backbone = TimmBackbone(name, img_size=(64, 96))
    load_backbone(backbone, tmp_path / "whole.pth")
    kept = {key.removeprefix("model."): tensor for key, tensor in backbone.network.state_dict().items()}
    if name == VIT:
        assert kept.pop("pos_embed").shape == (1, 1 + 4 * 6, 192)
    assert kept and all(
        torch.equal(tensor, whole[key.replace("_", ".", 1) if key not in whole else key])
        for key, tensor in kept.items()
    )
    del whole[next(iter(whole))]
    torch.save(whole, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"less\.pth does not fit .* at img_size=\(64, 96\): .*cls_token"):
        load_backbone(backbone, tmp_path / "less.pth")
