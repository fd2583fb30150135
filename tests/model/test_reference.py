"""The model against the published formulation with the same weights: outputs, gradients, routing."""

import copy

import pytest
import torch

from model import build_model
from model.layers.dropout import Dropout
from model.moe import SecondChoice, Top2Router
from model.reference import dense_published, dense_routing, relative_error


def small(policy="all", classes=1, generator="EncoderDecoderGenerator", fusion="DualAttentionMoE", **fusion_options):
    """A small MoDAT with every part that the dense formulation replaces, without dropout."""
    layer = dict(ffn_dim=32, dropout=0.0)
    if fusion == "DualAttentionMoE":
        policies = dict(second_policy_train=policy, second_policy_eval=policy)
        fusion_options = dict(num_experts=4, dropout=0.0, **policies) | fusion_options
    av_fusion = dict(av_fusion=dict(type="AVFusion", ffn_dim=32)) if generator == "EncoderDecoderGenerator" else {}
    return dict(
        type="MoDAT",
        num_frames=5,
        embed_dim=64,
        backbone=dict(type="pvt_v2_b0", drop_path_rate=0.0),
        audio_encoder=dict(channels=(4, 8, 8, 8), hidden_dim=32),
        head=dict(
            type="SegHead",
            num_classes=classes,
            num_queries=12,
            num_groups=8,
            mask_head=dict(type="MaskPredictor", hidden_dim=48, head_dims=(16, 8)),
            pixel_decoder=dict(type="PixelDecoder", num_groups=8),
            query_generator=dict(type=generator, ffn_dim=32, **av_fusion),
            transformer=dict(
                type="Transformer",
                encoder=dict(num_layers=2, layer=layer),
                decoder=dict(num_layers=2, layer=layer),
            ),
            fusion_block=dict(type=fusion, **fusion_options),
        ),
    )


CASES = {
    "all": dict(policy="all"),
    "none": dict(policy="none"),
    "threshold": dict(policy="threshold"),
    "random": dict(policy="random"),
    "crowded": dict(policy="all", capacity_factor_eval=0.5, capacity_factor_train=0.5),
    "one expert": dict(policy="all", num_experts=1),
    "71 classes": dict(classes=71),
    "channel only": dict(branches="channel"),
    "spatial only": dict(branches="spatial"),
    "all audio tokens": dict(audio_tokens="all"),
    "AVSegFormer": dict(generator="AttentionGenerator", fusion="CrossModalMixer"),
}


def pair(case):
    torch.manual_seed(0)
    model = build_model(small(**CASES[case]))
    for layer in model.head.transformer.encoder.layers:
        # Initial sampling points are pixel centres, where bilinear sampling is not differentiable.
        torch.nn.init.normal_(layer.self_attn.sampling_offsets.bias)
    return model, dense_published(model)


def inputs(model):
    """Arguments of a call: embeddings and maps of three 64 x 96 frames, one of them padding."""
    g = torch.Generator().manual_seed(1)
    maps = [
        torch.randn(3, c, 64 // s, 96 // s, generator=g)
        for c, s in zip(model.backbone.channels, (4, 8, 16, 32), strict=True)
    ]
    return {
        "log_mel": torch.zeros(3, 1, 96, 64),
        "frames": torch.zeros(3, 3, 64, 96),
        "frame_mask": torch.tensor([1.0, 1, 0]),
        "embedding": torch.randn(3, 128, generator=g).abs(),
        "features": maps,
    }


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors are faster with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_whole_model_equals_the_dense_formulation():
    model, dense = pair("all")
    frames = torch.randn(2, 1, 96, 64), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found, expected = model.eval()(*frames), dense.eval()(*frames)
    for name in ("logits", "mask_feature", "aux_loss"):
        assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-5, name
    for module in dense.modules():
        assert not getattr(module, "fused_attn", False) and not isinstance(module, Dropout)


@pytest.mark.parametrize("case", CASES)
def test_head_equals_the_dense_formulation(case):
    model, dense = pair(case)
    with torch.no_grad():
        found, expected = (network.eval()(**inputs(model)) for network in (model, dense))
    for name in ("logits", "mask_feature", "aux_loss"):
        assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-5, name


@pytest.mark.parametrize("case", [case for case in CASES if case != "random"])
def test_gradients_equal_the_dense_formulations(case):
    model, dense = pair(case)
    gradients = []
    for network in (dense, model):
        model.zero_grad(set_to_none=True)
        out = network.train()(**inputs(model))
        (out.logits.square().mean() + out.mask_feature.square().mean() + out.aux_loss).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    expected, found = gradients
    norm = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name in expected.keys() | found.keys():
        assert name in expected or found[name].abs().max() < 1e-6 * norm, name
        if name in found:
            # Relative to the whole gradient: some gradients are zero up to rounding (keys of single-key attention).
            assert (found[name] - expected[name]).norm() < 1e-4 * norm, name
        else:
            assert expected[name].abs().max() < 1e-6 * norm, name


def test_parameters_are_shared_not_copied():
    model, dense = pair("all")
    assert {id(p) for p in dense.parameters()} == {id(p) for p in model.parameters()}
    before = dense.eval()(**inputs(model)).logits
    with torch.no_grad():
        model.head.mask_head.classify.weight.mul_(2)
    torch.testing.assert_close(dense(**inputs(model)).logits, 2 * before)


def test_a_wrong_weight_is_noticed():
    model, dense = pair("all")
    changed = copy.deepcopy(model).eval()
    with torch.no_grad():
        changed.head.fusion_block.channel.experts.out_bias[0] += 0.5
        assert relative_error(changed(**inputs(model)).logits, dense.eval()(**inputs(model)).logits) > 1e-5


@pytest.mark.parametrize("policy", ["all", "none", "threshold", "random"])
@pytest.mark.parametrize("capacity_factor", [0.25, 1.0, 2.0])
def test_routes_are_the_same_token_for_token(policy, capacity_factor):
    torch.manual_seed(0)
    choice = SecondChoice(policy, 0.4, capacity_factor)
    router = Top2Router(8, 4, train=choice, evaluation=choice).eval()
    tokens = torch.randn(3, 50, 8)
    tokens[1] = tokens[1, :1]  # one frame whose tokens all choose the same experts
    dispatch, combine, balance = dense_routing(router, tokens, training=False)
    routing = router(tokens)
    assert routing.capacity == dispatch.shape[-1]
    torch.testing.assert_close(routing.weight, combine.sum(-1))
    assert torch.equal(routing.kept, dispatch.sum(-1) > 0)
    torch.testing.assert_close(routing.balance, balance)
    assert dispatch.sum((1, 3)).max() <= routing.capacity and dispatch.sum(1).max() <= 1  # one token per slot
