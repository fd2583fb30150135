"""One contract for every combination of the family: shapes, gradients, batches, frames."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from model import AVSModel, build_model
from model.avs_model import among_zeros, places
from utils.errors import ConfigError

LAYER = {"ffn_dim": 32, "dropout": 0.0, "num_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "modat": {},
    "learned queries": {"query_generator": {"query_init": "learned"}},
    "temporal": {"query_generator": {"early_fusion": {"type": "MTA", "num_heads": 2, "temporal": True}}},
    "four levels": {"query_generator": {"early_fusion": {"type": "MTA", "num_heads": 2, "num_layers": 4}}},
    "no early fusion": {"query_generator": {"early_fusion": None}},
    "repeat": {"query_generator": {"_delete_": True, "type": "RepeatGenerator"}},
    "attention": {"query_generator": {"_delete_": True, "type": "AttentionGenerator", "num_layers": 2, "num_heads": 2}},
    "channel": {"fusion_block": {"branches": "channel"}},
    "spatial": {"fusion_block": {"branches": "spatial", "audio_tokens": "all"}},
    "all audio tokens": {"fusion_block": {"audio_tokens": "all"}},
    "one expert": {"fusion_block": {"num_experts": 1}},
    "no padding": {"fusion_block": {"pad_capacity": False}},
    "threshold": {"fusion_block": {"second_policy_train": "threshold", "second_policy_eval": "threshold"}},
    "none": {"fusion_block": {"second_policy_train": "none", "second_policy_eval": "none"}},
    "all": {"fusion_block": {"second_policy_train": "all", "second_policy_eval": "all"}},
    "mixer": {"fusion_block": {"_delete_": True, "type": "CrossModalMixer", "num_heads": 2}},
    "no fusion": {"fusion_block": None},
    "no learnable query": {"use_learnable_queries": False},
}


def tiny(change: dict[str, Any], backbone: str = "pvt_v2_b0", num_classes: int = 1, frames: int = 3) -> dict[str, Any]:
    """A small MoDAT with a part of its head exchanged."""
    head: dict[str, Any] = {
        "type": "SegHead",
        "num_classes": num_classes,
        "query_num": 6,
        "num_groups": 4,
        "mask_hidden_dim": 16,
        "head_dims": (8, 4),
        "query_generator": {
            "type": "EncoderDecoderGenerator",
            "num_layers_decoder": 2,
            "num_heads": 2,
            "hidden_dim": 32,
            "early_fusion": {"type": "MTA", "num_heads": 2, "hidden_dim": 32},
        },
        "fusion_block": {"type": "CSA", "num_heads": 2, "num_experts": 4, "dropout": 0.0},
        "transformer": {
            "type": "Transformer",
            "encoder": {"num_layers": 1, "layer": {**LAYER, "num_points": 2}},
            "decoder": {"num_layers": 1, "layer": LAYER},
        },
    }
    for key, value in copy.deepcopy(change).items():
        if isinstance(value, dict):
            head[key] = {**({} if value.pop("_delete_", False) else head[key]), **value}
        else:
            head[key] = value
    return {
        "type": "MoDAT",
        "backbone": {"type": backbone},
        "vggish": {"freeze_audio_extractor": False, "channels": (2, 4, 4, 8), "hidden_dim": 16},
        "head": head,
        "embed_dim": 16,
        "T": frames,
    }


def example(frames: int, height: int = 64, width: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-mel patches and pictures."""
    draw = torch.Generator().manual_seed(5)
    return torch.randn(frames, 1, 96, 64, generator=draw), torch.randn(frames, 3, height, width, generator=draw)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("num_classes", [1, 71])
@pytest.mark.parametrize("name", MODELS)
def test_every_combination_trains_and_evaluates(name: str, num_classes: int) -> None:
    network = build_model(tiny(MODELS[name], num_classes=num_classes))
    log_mel, frames = example(6)
    out = network.train()(log_mel, frames, torch.tensor([1, 1, 1, 1, 1, 0.0]))
    assert out.logits.shape == (6, num_classes, 64, 96)
    assert out.mask_feature.shape == (6, 16, 16, 24)
    assert out.aux_loss.shape == ()
    (out.logits.square().mean() + out.aux_loss).backward()
    idle = {
        parameter_name
        for parameter_name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all()
    }
    assert not idle
    with torch.no_grad():
        assert torch.equal(network.eval()(log_mel, frames).logits, network(log_mel, frames).logits)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_answers_for_some_frames_are_those_for_all(name: str, known: bool) -> None:
    network = build_model(tiny(MODELS[name])).train()
    flag, answered = torch.tensor([1, 1, 1, 1, 0, 1.0]), torch.tensor([0, 3, 4])
    log_mel, frames = example(6)
    found = []
    for rows in (None, answered):
        torch.manual_seed(1)  # second choices are drawn
        network.zero_grad(set_to_none=True)
        inputs = {"embedding": network.vggish(log_mel), "features": network.backbone(frames)} if known else {}
        out = network(log_mel, frames, flag, rows, **inputs)
        logits, feature = (x if rows is not None else x[answered] for x in (out.logits, out.mask_feature))
        (logits.square().mean() + feature.square().mean() + out.aux_loss).backward()
        found.append((logits, feature, out.aux_loss, *(parameter.grad for parameter in network.parameters())))
    for of_all, of_some in zip(*found, strict=True):
        torch.testing.assert_close(of_all, of_some, rtol=1e-4, atol=1e-5)


def test_frames_without_label_are_left_out_of_what_does_not_need_them() -> None:
    seen: dict[str, int] = {}

    def watch(name: str) -> Any:
        return lambda _module, inputs: seen.update({name: len(inputs[0])})

    expected = {"modat": (6, 6, 2), "temporal": (6, 6, 2), "mixer": (2, 2, 2), "no fusion": (2, 2, 2)}
    for name, counts in expected.items():
        network = build_model(tiny(MODELS[name])).train()
        network.backbone.register_forward_pre_hook(watch("backbone"))
        network.head.pixel_decoder.register_forward_pre_hook(watch("pixel decoder"))
        network.head.mask_predictor.register_forward_pre_hook(watch("mask predictor"))
        network(*example(6), answered=torch.tensor([0, 3]))
        assert tuple(seen.values()) == counts, name


def test_batch_normalisation_sees_all_frames() -> None:
    network = build_model(tiny(MODELS["mixer"], "res50")).train()
    counted = backbone_counts(network)
    network(*example(6), answered=torch.tensor([0, 3]))
    network(*example(6), torch.tensor([1, 1, 1, 1, 0, 0.0]))
    assert counted == [6, 6]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_backbone_does_not_see_padding(name: str, training: bool) -> None:
    network = build_model(tiny(MODELS[name])).train(training)
    counted = backbone_counts(network)
    flag = torch.tensor([1, 1, 0, 1, 0, 0.0])
    log_mel, frames = example(6)
    found = []
    for features in (None, network.backbone(frames)):
        torch.manual_seed(1)
        network.zero_grad(set_to_none=True)
        out = network(log_mel, frames, flag, features=features)
        (out.logits.square().mean() + out.aux_loss).backward()
        found.append((*out, *(parameter.grad for parameter in network.backbone.parameters())))
    assert counted == [6, 6 if training and name == "four levels" else 3]  # batch normalisation
    for without, with_all in zip(*found, strict=True):
        torch.testing.assert_close(without, with_all, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_computes_real_frames_alone(name: str) -> None:
    network = build_model(tiny(MODELS[name])).eval()
    flag = torch.tensor([1, 1, 0, 1, 0, 0.0])
    real = places(flag)
    assert real is not None
    seen: list[int] = []
    network.head.mask_predictor.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    network.head.pixel_decoder.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        expected = network(*example(6), flag).logits
        del seen[:]
        found = network(*example(6), flag, real).logits
    assert seen == ([6, 3] if name == "temporal" else [3, 3])
    torch.testing.assert_close(among_zeros(found, real, 6), expected, rtol=1e-4, atol=1e-5)


def test_places_of_flagged_frames() -> None:
    assert places(None) is None
    assert places(torch.ones(3)) is None
    assert places(torch.zeros(3)) is None
    assert torch.equal(places(torch.tensor([0, 1, 1.0])), torch.tensor([1, 2]))  # type: ignore[arg-type]


def backbone_counts(network: AVSModel) -> list[int]:
    """A list that grows by the number of frames whenever the backbone looks at some."""
    counted: list[int] = []
    network.backbone.register_forward_pre_hook(lambda _module, inputs: counted.append(len(inputs[0])))
    return counted


@pytest.mark.parametrize("name", [name for name in MODELS if name != "temporal"])
def test_a_frame_alone_is_itself_in_a_batch(name: str) -> None:
    network = build_model(tiny(MODELS[name])).eval()
    log_mel, frames = example(3)
    with torch.no_grad():
        together = network(log_mel, frames).logits
        alone = torch.cat([network(log_mel[i : i + 1], frames[i : i + 1]).logits for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_temporal_fusion_hears_the_whole_clip_and_no_padding() -> None:
    network = build_model(tiny(MODELS["temporal"])).eval()
    log_mel, frames = example(3)
    flag = torch.tensor([1.0, 1.0, 0.0])
    with torch.no_grad():
        before = network(log_mel, frames, flag).logits
        frames[2] = 7.0
        assert torch.equal(before, network(log_mel, frames, flag).logits)
        frames[1] = 7.0
        assert not torch.allclose(before[0], network(log_mel, frames, flag).logits[0])
    with pytest.raises(ValueError, match="2 frames are no multiple of T=3"):
        network(log_mel[:2], frames[:2])


@pytest.mark.parametrize("backbone", ["res50", "pvt_v2_b0", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_any_timm_backbone_with_four_strides_stands_in(backbone: str) -> None:
    if backbone.startswith("swin"):
        network = build_model(tiny({}, backbone))
        log_mel, frames = example(1, 224, 224)
    else:
        network = build_model(tiny({}, backbone))
        log_mel, frames = example(1)
    with torch.no_grad():
        assert network.eval()(log_mel, frames).logits.shape == (1, 1, *frames.shape[2:])


def test_checkpointed_activations_give_the_same_gradients() -> None:
    network = build_model(tiny({"fusion_block": {"second_policy_train": "all"}})).train()
    log_mel, frames = example(2)
    gradients = []
    for enable in (False, True):
        network.set_activation_checkpointing(enable)
        network.zero_grad()
        network(log_mel, frames).logits.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backbone", ["pvt_v2_b0", "res50", "convnext_atto"])
def test_checkpointing_computes_nothing_a_third_time(backbone: str) -> None:
    network = build_model(tiny({}, backbone)).train()
    network.set_activation_checkpointing()
    calls: Counter[torch.nn.Module] = Counter()
    layers = [module for module in network.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, _: calls.update([module]))
    network(*example(1)).logits.square().mean().backward()
    recomputed = [layer for layer in layers if calls[layer] == 2]
    assert max(calls.values()) == 2
    for part in (network.backbone, network.head.transformer.encoder_layers, network.head.transformer.decoder_layers):
        assert not set(part.modules()).isdisjoint(recomputed)


def test_masks_made_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_model(tiny({})).eval()
    inputs = example(5)
    seen: list[int] = []
    network.head.mask_predictor.reduce.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    with_gradient = network(*inputs)
    monkeypatch.setattr("model.mask_head.PIXELS_AT_ONCE", 2 * 16 * 24 + 1)
    with torch.no_grad():
        without = network(*inputs)
    assert seen == [5, 2, 2, 1]
    for found, expected in zip(without, with_gradient, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_frozen_backbone_and_vggish_record_no_gradient() -> None:
    cfg = tiny({})
    cfg["vggish"]["freeze_audio_extractor"] = True
    network = build_model(cfg)
    network.freeze_backbone()
    network(*example(2)).logits.mean().backward()
    assert all(parameter.grad is None for parameter in [*network.backbone.parameters(), *network.vggish.parameters()])
    network.freeze_backbone(False)
    network(*example(2)).logits.mean().backward()
    assert all(parameter.grad is not None for parameter in network.backbone.parameters())


BROKEN: dict[str, tuple[str, Any, str]] = {
    "unknown key": (
        "head",
        {"query_nums": 3},
        "model.head.query_nums is no option of SegHead: did you mean 'query_num'",
    ),
    "unknown type": (
        "head",
        {"fusion_block": {"type": "CSB"}},
        "model.head.fusion_block.type='CSB' is no fusion block",
    ),
    "unknown policy": (
        "head",
        {"fusion_block": {"type": "CSA", "second_policy_eval": "some"}},
        "'some' is none of all",
    ),
    "no type": ("head", {"query_generator": {}}, "model.head.query_generator has no 'type'"),
    "contradiction": (
        "head",
        {"query_generator": {"type": "RepeatGenerator", "query_num": 5}},
        "query_num=5 contradicts 6, which the rest of the model has",
    ),
    "wrong channels": ("head", {"in_channels": [1, 2, 3, 4]}, "in_channels=.1, 2, 3, 4. contradicts"),
    "heads": ("head", {"fusion_block": {"type": "CSA", "num_heads": 3}}, "not a multiple of num_heads=3"),
    "groups": ("head", {"num_groups": 5}, "embed_dim=16 is not a multiple of num_groups=5"),
    "backbone": ("backbone", {"type": "pvt_v2_b9"}, "model.backbone.type='pvt_v2_b9' is no network of timm's"),
    "strides": ("backbone", {"type": "vit_tiny_patch16_224"}, "model.backbone.type='vit_tiny_patch16_224'"),
    "no weights": ("backbone", {"type": "res50", "init_weights_path": "nowhere.pth"}, "no weights file nowhere.pth"),
    "neck": ("neck", {"type": "FPN"}, "model.neck must be None"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_config_is_told_what_is_wrong(name: str) -> None:
    section, change, message = BROKEN[name]
    cfg = tiny({})
    cfg[section] = {**cfg.get(section, {}), **change}
    with pytest.raises(Exception, match=message) as caught:
        build_model(cfg)
    assert isinstance(caught.value, ConfigError) or "weights file" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["modat", "all audio tokens", "channel", "spatial", "mixer"])
def test_fusion_takes_either_precision_under_autocast(name: str, dtype: torch.dtype) -> None:
    """On a GPU group normalisation hands it float32, on a CPU what came in."""
    fusion = build_model(tiny(MODELS[name])).head.fusion_block
    feature = torch.randn(2, 16, 8, 8).to(dtype).requires_grad_()
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            fused, aux_loss = fusion.train(training)(feature, torch.randn(2, 3, 16))
        (fused.float().square().mean() + aux_loss).backward()
        assert fused.shape == feature.shape and fused.isfinite().all()
    assert feature.grad.isfinite().all()


@pytest.mark.parametrize("name", ["modat", "temporal", "attention", "mixer"])
def test_bf16_is_close_to_float32(name: str) -> None:
    network = build_model(tiny(MODELS[name])).train()
    log_mel, frames = example(3)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(log_mel, frames)
    (out.logits.float().mean() + out.aux_loss).backward()
    network.eval()
    with torch.no_grad():
        exact = network(log_mel, frames).logits
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(log_mel, frames).logits.float()
    assert float((exact - rounded).norm() / exact.norm()) < 0.2
