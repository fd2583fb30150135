"""One contract for every combination: shapes, gradients, batches, frames."""

from collections import Counter
from typing import Any

import pytest
import torch

from model import AVSModel, build_model
from model.avs_model import flagged_indices, scatter_rows
from model.mask_head import MaskPredictor
from tests.support import VARIANTS, example, tiny
from utils.errors import ConfigError
from utils.registry import MODELS


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("num_classes", [1, 71])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_combination_trains_and_evaluates(name: str, num_classes: int) -> None:
    network = build_model(tiny(VARIANTS[name], num_classes=num_classes))
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
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_masks_of_some_frames_are_those_of_all_frames(name: str, training: bool, known: bool) -> None:
    network = build_model(tiny(VARIANTS[name])).train(training)
    flag, frame_indices = torch.tensor([1, 1, 1, 1, 0, 1.0]), torch.tensor([0, 3, 4])
    log_mel, frames = example(6)
    found = []
    for rows in (None, frame_indices):
        torch.manual_seed(1)  # of the second experts
        network.zero_grad(set_to_none=True)
        inputs = {"embedding": network.audio_encoder(log_mel), "features": network.backbone(frames)} if known else {}
        out = network(log_mel, frames, flag, rows, **inputs)
        logits, feature = (x if rows is not None else x[frame_indices] for x in (out.logits, out.mask_feature))
        # In evaluation, where frames can be left out from the start, nobody asks for the balance loss.
        aux_loss = out.aux_loss if training else torch.zeros(())
        (logits.square().mean() + feature.square().mean() + aux_loss).backward()
        found.append((logits, feature, aux_loss, *(parameter.grad for parameter in network.parameters())))
    for of_all, of_some in zip(*found, strict=True):
        torch.testing.assert_close(of_all, of_some, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("skipped", ["frame_indices", "frame_mask"])
def test_batch_statistics_are_those_of_all_frames(skipped: str) -> None:
    statistics = []
    flag = torch.tensor([1, 1, 1, 1, 0, 0.0])
    for options in ({}, {skipped: flag if skipped == "frame_mask" else torch.tensor([0, 3])}):
        torch.manual_seed(0)
        network = build_model(tiny(VARIANTS["mixer"], "res50")).train()
        network(*example(6), **options)
        statistics.append([buffer.clone() for buffer in network.backbone.buffers()])
    for of_all, of_some in zip(*statistics, strict=True):
        assert torch.equal(of_all, of_some)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_backbone_skips_padded_frames(name: str, training: bool) -> None:
    network = build_model(tiny(VARIANTS[name])).train(training)
    counted = backbone_counts(network)
    flag = torch.tensor([1, 1, 0, 1, 0, 0.0])
    log_mel, frames = example(6)
    found = []
    for features in (None, network.backbone(frames)):
        torch.manual_seed(1)
        network.zero_grad(set_to_none=True)
        out = network(log_mel, frames, flag, features=features, real_indices=flagged_indices(flag))
        (out.logits.square().mean() + out.aux_loss).backward()
        found.append((*out, *(parameter.grad for parameter in network.backbone.parameters())))
    assert counted == [6, 6 if training and name == "four levels" else 3]  # which has batch normalisation
    for without, with_all in zip(*found, strict=True):
        torch.testing.assert_close(without, with_all, rtol=1e-4, atol=1e-5)


def test_flagged_indices() -> None:
    assert flagged_indices(None) is None
    assert flagged_indices(torch.ones(3)) is None
    assert flagged_indices(torch.zeros(3)) is None
    assert torch.equal(flagged_indices(torch.tensor([0, 1, 1.0])), torch.tensor([1, 2]))  # type: ignore[arg-type]


def test_scattered_rows_are_zero_elsewhere() -> None:
    rows = torch.randn(2, 3, 4)
    scattered = scatter_rows(rows, torch.tensor([3, 1]), 4)
    assert torch.equal(scattered[[3, 1]], rows) and not scattered[[0, 2]].any()
    assert scatter_rows(rows, None, 2) is rows


def backbone_counts(network: AVSModel) -> list[int]:
    """A list to which each call of the backbone appends its number of frames."""
    counted: list[int] = []
    network.backbone.register_forward_pre_hook(lambda _module, inputs: counted.append(len(inputs[0])))
    return counted


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "temporal"])
def test_a_batch_equals_its_single_frames(name: str) -> None:
    network = build_model(tiny(VARIANTS[name])).eval()
    log_mel, frames = example(3)
    with torch.no_grad():
        together = network(log_mel, frames).logits
        alone = torch.cat([network(log_mel[i : i + 1], frames[i : i + 1]).logits for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_temporal_fusion_attends_to_the_whole_clip_without_padding() -> None:
    network = build_model(tiny(VARIANTS["temporal"])).eval()
    log_mel, frames = example(3)
    flag = torch.tensor([1.0, 1.0, 0.0])
    with torch.no_grad():
        before = network(log_mel, frames, flag).logits
        frames[2] = 7.0
        assert torch.equal(before, network(log_mel, frames, flag).logits)
        frames[1] = 7.0
        assert not torch.allclose(before[0], network(log_mel, frames, flag).logits[0])
    with pytest.raises(ValueError, match="2 frames are not a multiple of T=3"):
        network(log_mel[:2], frames[:2])


@pytest.mark.parametrize("backbone", ["res50", "pvt_v2_b0", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_any_timm_backbone_with_four_strides_fits(backbone: str) -> None:
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
def test_checkpointing_computes_each_layer_at_most_twice(backbone: str) -> None:
    network = build_model(tiny({}, backbone)).train()
    network.set_activation_checkpointing()
    calls: Counter[torch.nn.Module] = Counter()
    layers = [module for module in network.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, _: calls.update([module]))
    network(*example(1)).logits.square().mean().backward()
    recomputed = [layer for layer in layers if calls[layer] == 2]
    assert max(calls.values()) == 2
    for part in (network.backbone, network.head.transformer.encoder, network.head.transformer.decoder):
        assert not set(part.modules()).isdisjoint(recomputed)


def test_masks_of_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_model(tiny({})).eval()
    inputs = example(5)
    seen: list[int] = []
    network.head.mask_head.reduce.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    with_gradient = network(*inputs)
    monkeypatch.setattr("model.mask_head.CHUNK_PIXELS", 2 * 16 * 24 + 1)
    with torch.no_grad():
        without = network(*inputs)
    assert seen == [5, 2, 2, 1]
    for found, expected in zip(without, with_gradient, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_frozen_backbone_and_audio_encoder_record_no_gradient() -> None:
    cfg = tiny({})
    cfg["audio_encoder"]["frozen"] = True
    network = build_model(cfg)
    network.freeze_backbone()
    network(*example(2)).logits.mean().backward()
    frozen = [*network.backbone.parameters(), *network.audio_encoder.parameters()]
    assert all(parameter.grad is None for parameter in frozen)
    network.freeze_backbone(False)
    network(*example(2)).logits.mean().backward()
    assert all(parameter.grad is not None for parameter in network.backbone.parameters())


BROKEN: dict[str, tuple[str, Any, str]] = {
    "unknown key": (
        "head",
        {"number_queries": 3},
        "model.head.number_queries is not an option of SegHead: did you mean 'num_queries'",
    ),
    "unknown type": (
        "head",
        {"fusion_block": {"type": "DualAttention"}},
        "model.head.fusion_block.type='DualAttention' is not a registered model: did you mean 'DualAttentionMoE'",
    ),
    "unknown policy": (
        "head",
        {"fusion_block": {"type": "DualAttentionMoE", "second_policy_eval": "some"}},
        "'some' is not one of all",
    ),
    "no type": ("head", {"query_generator": {}}, "model.head.query_generator has no 'type'"),
    "contradiction": (
        "head",
        {"query_generator": {"type": "RepeatGenerator", "num_queries": 5}},
        "num_queries=5 contradicts 6, the value of the rest of the model",
    ),
    "wrong channels": ("head", {"in_channels": [1, 2, 3, 4]}, "in_channels=.1, 2, 3, 4. contradicts"),
    "heads": ("head", {"fusion_block": {"type": "DualAttentionMoE", "num_heads": 3}}, "not a multiple of num_heads=3"),
    "groups": ("head", {"num_groups": 5}, "embed_dim=16 is not a multiple of num_groups=5"),
    "backbone": ("backbone", {"type": "pvt_v2_b9"}, "model.backbone.type='pvt_v2_b9' is not a network of timm"),
    "strides": ("backbone", {"type": "levit_128"}, "model.backbone.type='levit_128' has feature maps at strides"),
    "pixel decoder groups": (
        "head",
        {"pixel_decoder": {"num_groups": 5}},
        "PixelDecoder.: embed_dim=16",
    ),
    "key of another type": (
        "head",
        {"fusion_block": {"type": "CrossModalMixer", "num_experts": 4}},
        "num_experts is not an option of CrossModalMixer.*add _delete_=True to model.head.fusion_block",
    ),
    "channels": ("audio_encoder", {"channels": (4, 4)}, r"model.audio_encoder \(VGGish\): VGGish has four stages"),
    "layers": ("head", {"transformer": {"type": "Transformer", "encoder": {"layers": 1}}}, "encoder.layers is not an"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_errors_of_a_config_name_key_and_value(name: str) -> None:
    section, change, message = BROKEN[name]
    cfg = tiny({})
    cfg[section] = {**cfg.get(section, {}), **change}
    with pytest.raises(ConfigError, match=message):
        build_model(cfg)


def test_an_error_within_a_block_names_the_block_and_keeps_its_cause() -> None:
    class Broken(torch.nn.Module):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(width)  # type: ignore[call-arg]

    MODELS.register_module("Broken", module=Broken)
    try:
        with pytest.raises(ConfigError, match=r"model\.head\.fusion_block \(Broken\).*TypeError at test_contract") as e:
            build_model(tiny({"fusion_block": {"_delete_": True, "type": "Broken"}}))
    finally:
        del MODELS.module_dict["Broken"]
    assert isinstance(e.value.__cause__, TypeError)


def test_mask_head_and_pixel_decoder_are_swapped_by_name() -> None:
    class Sharper(MaskPredictor):
        def forward(self, queries: torch.Tensor, mask_feature: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(queries, mask_feature)

    MODELS.register_module("Sharper", module=Sharper)
    try:
        cfg = tiny({"mask_head": {"type": "Sharper", "scale_factor": 2}})
        torch.manual_seed(0)
        found = build_model(cfg).eval()(*example(1)).logits
        cfg["head"]["mask_head"]["type"] = "MaskPredictor"
        torch.manual_seed(0)
        assert torch.equal(found, 2 * build_model(cfg).eval()(*example(1)).logits)
    finally:
        del MODELS.module_dict["Sharper"]
    assert found.shape == (1, 1, 32, 48)


def test_the_positional_encoding_of_the_config_reaches_the_fusion_block() -> None:
    cfg = tiny({})
    cfg["head"]["positional_encoding"] = {"type": "SinePositionalEncoding", "temperature": 20}
    head = build_model(cfg).head
    assert head.fusion_block.positional_encoding is head.positional_encoding  # type: ignore[union-attr]
    assert head.positional_encoding.temperature == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["modat", "all audio tokens", "channel", "spatial", "mixer"])
def test_fusion_accepts_both_dtypes_under_autocast(name: str, dtype: torch.dtype) -> None:
    """Under autocast, GroupNorm outputs float32 on a GPU and its input's dtype on a CPU."""
    fusion = build_model(tiny(VARIANTS[name])).head.fusion_block
    feature = torch.randn(2, 16, 8, 8).to(dtype).requires_grad_()
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            fused, aux_loss = fusion.train(training)(feature, torch.randn(2, 3, 16))
        (fused.float().square().mean() + aux_loss).backward()
        assert fused.shape == feature.shape and fused.isfinite().all()
    assert feature.grad.isfinite().all()


@pytest.mark.parametrize("name", ["modat", "temporal", "attention", "mixer"])
def test_bf16_is_close_to_float32(name: str) -> None:
    network = build_model(tiny(VARIANTS[name])).train()
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
