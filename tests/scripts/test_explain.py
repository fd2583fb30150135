"""What is seen inside a model: the routers' weights, the attention, and the pictures of both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dataloader import build_dataset
from model import build_model
from model.layers.attention import MultiheadAttention
from scripts.engine.explain import Watch, attention_weights, explain, level_sum, most_different, spread
from scripts.engine.testing import ModelPredictor
from scripts.engine.trackers import TensorBoard, show_in_tensorboard
from test import load_predictor
from tests.support import example, tiny
from utils.config import load_config


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_the_one_that_the_layer_applies(bias: bool) -> None:
    torch.manual_seed(0)
    layer = MultiheadAttention(8, 2, bias=bias).eval()
    if layer.in_proj_bias is not None:
        torch.nn.init.normal_(layer.in_proj_bias)
    query, memory = torch.randn(2, 3, 8), torch.randn(2, 7, 8)
    weights = attention_weights(layer, query, memory)
    assert weights.shape == (2, 3, 7) and torch.allclose(weights.sum(-1), torch.ones(2, 3))
    with torch.no_grad():  # values that are the same in all heads show the mean of the heads' weights
        layer.in_proj_weight[16:], layer.out_proj.weight[:] = 0.0, torch.eye(8)
        layer.in_proj_weight[16:, 0] = 1.0
        for one in (layer.in_proj_bias, layer.out_proj.bias):
            if one is not None:
                one[-8:] = 0.0
        memory_values = memory[..., 0]
        expected = layer(query, memory).mean(-1)
        assert torch.allclose(
            (attention_weights(layer, query, memory) @ memory_values[..., None])[..., 0], expected, atol=1e-5
        )


def test_a_watched_pass_gives_the_same_output_and_leaves_no_hook() -> None:
    torch.manual_seed(0)
    model = build_model(tiny({})).eval()
    log_mel, frames = example(2)
    before = model(log_mel, frames).logits
    with Watch(model) as watch:
        assert torch.equal(model(log_mel, frames).logits, before)
    assert set(watch.seen.routing) == {"channel", "spatial"}
    assert watch.seen.routing["channel"].shape == (2, 16 * 24, 4) and watch.seen.attention is not None
    assert watch.seen.attention.shape == (2, 6, sum(h * w for h, w in watch.seen.shapes))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_levels_are_summed_without_losing_attention() -> None:
    attention = torch.rand(8 * 12 + 4 * 6 + 2 * 3)
    found = level_sum(attention, ((8, 12), (4, 6), (2, 3)))
    assert found.shape == (8, 12) and found.sum() == pytest.approx(float(attention.sum()), rel=1e-5)


def test_queries_that_differ_are_found() -> None:
    attention = torch.eye(4)[[0, 0, 0, 2, 0, 1]]
    assert set(most_different(attention, 2)) == {3, 5}
    assert sorted(most_different(attention, 9)) == [0, 1, 2, 3, 4, 5]
    assert spread(torch.ones(3, 4) / 4) == 0 and 0 < spread(attention) < 1


@pytest.mark.parametrize(
    ("change", "written"),
    [({}, ["test_attention", "test_experts"]), ({"fusion_block": None}, ["test_attention"])],
)
def test_pictures_are_drawn_of_what_the_model_has(
    drawn: Path, splits: Callable[..., dict[str, Any]], tmp_path: Path, change: dict[str, Any], written: list[str]
) -> None:
    dataset = build_dataset(splits(drawn, "ms3")["test"], where="dataset.test")
    model = build_model(tiny(change, num_frames=5))
    found = explain(ModelPredictor(model, "32", torch.device("cpu")), dataset, tmp_path, "test")
    assert sorted(path.stem for path in found) == written == sorted(path.stem for path in tmp_path.rglob("*.png"))
    for path in found:
        assert np.asarray(Image.open(path).convert("L")).std() > 20


@pytest.mark.parametrize(("setting", "mode"), [(True, None), ("reduce-overhead", "reduce-overhead")])
def test_a_model_is_compiled_as_in_training_but_not_where_it_is_looked_into(
    monkeypatch: pytest.MonkeyPatch, setting: Any, mode: str | None
) -> None:
    modes: list[str | None] = []
    layer: Any = torch.nn.Linear(2, 2)
    layer.compile = lambda mode: modes.append(mode)
    monkeypatch.setattr("model.build_model", lambda _: layer)
    monkeypatch.setattr("model.packed.load_checkpoint", lambda *_: None)
    cfg = load_config("config/ms3/MoDAT_pvt2_ms3.py", ["process.precision=32"])
    cfg.process.compile = setting
    load_predictor(cfg, Path("weights.pth"), hooks=True)  # compiled models call no hooks
    assert modes == []
    load_predictor(cfg, Path("weights.pth"))
    assert modes == [mode]


def test_pictures_of_a_test_go_to_the_tensorboard_of_its_run(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("test", "test_extremes", "val"):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"{name}.png")
    show_in_tensorboard(tmp_path, "test")
    assert not (tmp_path / "tensorboard").exists()  # a run that has none
    TensorBoard(tmp_path / "tensorboard").close()
    show_in_tensorboard(tmp_path, "test")
    content = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"test/clips" in content and b"test/extremes" in content and b"val/" not in content
