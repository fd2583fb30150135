"""Parity with arrays computed by the published code."""

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import AVSModel, build_model
from model.checkpoint import load_weights
from tests.published_files import REFERENCE, published_model_config, published_weights
from tests.reference.fill import inputs

CASES = {  # reference file: model, backbone, task, second-expert policy, frames, padding flag
    "modat_pvt2_ms3_all": ("MoDAT", "pvt2", "ms3", "all", 2, None),
    "modat_pvt2_ms3_none": ("MoDAT", "pvt2", "ms3", "none", 2, None),
    "modat_pvt2_avss_all": ("MoDAT", "pvt2", "avss", "all", 4, (1, 1, 0, 0)),
    "avsegformer_pvt2_ms3": ("AVSegFormer", "pvt2", "ms3", None, 2, None),
    "avsegformer_res50_s4": ("AVSegFormer", "res50", "s4", None, 2, None),
    "avsegformer_pvt2_avss": ("AVSegFormer", "pvt2", "avss", None, 4, (1, 1, 0, 0)),
}


@lru_cache(maxsize=1)
def published_model(model: str, backbone: str, task: str, policy: str | None) -> AVSModel:
    """A published model in evaluation mode, on its reference weights."""
    cfg = published_model_config(model, backbone, task)
    if policy is not None:
        cfg["head"]["fusion_block"]["second_policy_eval"] = policy
    network = build_model(cfg).eval()
    load_weights(network, published_weights(model, backbone, cfg["head"]["num_classes"]))
    return network


def relative_error(found: Any, expected: Any) -> float:
    """Norm of the difference over norm."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def run(network: AVSModel, log_mel: Tensor, frames: Tensor, flag: Tensor | None) -> dict[str, Any]:
    """The arrays of a reference file."""
    seen: dict[str, Any] = {}
    hooks = [
        network.audio_encoder.register_forward_hook(lambda _, __, out: seen.update(vggish=out)),
        network.head.query_generator.register_forward_hook(
            lambda _, __, out: seen.update(generated_queries=out.queries[:, ::100, ::16])
        ),
        network.head.transformer.encoder.register_forward_hook(
            lambda _, __, out: seen.update(memory=out[:, ::64, ::16])
        ),
        network.head.transformer.decoder.register_forward_hook(
            lambda _, __, out: seen.update(queries=out[-1][:, ::30, ::16])
        ),
    ]
    with torch.no_grad():
        maps = network.backbone(frames)  # of padded frames too, which the model skips
        out = network(log_mel, frames, flag)
    for hook in hooks:
        hook.remove()
    stats = torch.stack([out.logits.mean(), out.logits.std(), out.logits.min(), out.logits.max()])
    return seen | {
        "c2": maps[0][:, ::8, ::8, ::8],
        "c5": maps[3][:, ::32],
        "logits": out.logits[..., ::8, ::8],
        "logits_stats": stats,
        "mask_feature": out.mask_feature[:, ::16, ::8, ::8],
        "aux_loss": out.aux_loss,
    }


@pytest.mark.parametrize("name", CASES)
def test_every_array_is_the_published_one(name: str) -> None:
    model, backbone, task, policy, count, padding = CASES[name]
    reference = np.load(REFERENCE / f"{name}.npz")
    flag = None if padding is None else torch.tensor(padding, dtype=torch.float32)
    found = run(published_model(model, backbone, task, policy), *inputs(count, 224), flag)
    for key in reference:
        if key == "aux_loss":
            assert float(found[key]) == pytest.approx(float(reference[key]), abs=1e-6)
        else:
            limit = 1e-3 if key.startswith("logits") else 1e-4
            assert relative_error(found[key], reference[key]) < limit, key
        if key == "logits_stats" and padding is None:
            assert found[key].numpy() == pytest.approx(reference[key], abs=1e-3)


@pytest.mark.parametrize("size", [96, (64, 160)])
def test_a_batch_is_its_single_frames(size: Any) -> None:
    network = published_model("MoDAT", "pvt2", "ms3", "all")
    log_mel, frames = inputs(3, 160, seed=7)
    frames = torch.nn.functional.interpolate(frames, size=size)
    with torch.no_grad():
        together = network(log_mel, frames)
        alone = [network(log_mel[i : i + 1], frames[i : i + 1]) for i in range(3)]
    assert relative_error(together.logits, torch.cat([out.logits for out in alone])) < 1e-4
    assert float(together.aux_loss) == pytest.approx(np.mean([float(out.aux_loss) for out in alone]), abs=1e-6)


def test_padded_frames_are_zero_and_change_no_other_frame() -> None:
    network = published_model("MoDAT", "pvt2", "ms3", "all")
    log_mel, frames = inputs(3, 64, seed=3)
    with torch.no_grad():
        padded = network(log_mel, frames, torch.tensor([1.0, 1.0, 0.0]))
        whole = network(log_mel[:2], frames[:2])
    assert not padded.logits[2].any() and not padded.mask_feature[2].any()
    assert relative_error(padded.logits[:2], whole.logits) < 1e-4


def test_evaluation_with_random_second_experts_repeats_itself() -> None:
    cfg = published_model_config("MoDAT", "pvt2", "ms3")
    cfg["head"]["fusion_block"]["second_policy_eval"] = "random"
    network = build_model(cfg).eval()
    load_weights(network, published_weights("MoDAT", "pvt2", 1))
    log_mel, frames = inputs(2, 64)
    with torch.no_grad():
        first, second, one = network(log_mel, frames), network(log_mel, frames), network(log_mel[1:], frames[1:])
    assert torch.equal(first.logits, second.logits)
    assert relative_error(first.logits[1:], one.logits) < 1e-4
