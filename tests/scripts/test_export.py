"""Exported files agree with their model on numbers of frames that they were not made with."""

import builtins
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from mmengine.config import Config
from torch import Tensor, nn

from model import build_model
from model.checkpoint import save_weights
from scripts.export import main
from scripts.exporting import Exported, export_model
from scripts.exporting.formats import FORMATS, read_onnx, read_pt2
from tests.support import tiny
from utils.errors import CheckpointError, ConfigError
from utils.registry import MODELS

REPEAT = {"_delete_": True, "type": "RepeatGenerator"}
SMALL: dict[str, dict[str, Any]] = {
    "mixture of experts": {"query_generator": REPEAT},
    "mask classification": {
        "query_generator": REPEAT,
        "fusion_block": None,
        "mask_head": {"_delete_": True, "type": "MaskClassifier", "hidden_dim": 8},
    },
    "temporal": {
        "query_generator": {
            "num_layers": 1,
            "av_fusion": {"type": "AVFusion", "num_heads": 2, "ffn_dim": 16, "num_layers": 1, "temporal": True},
        },
        "fusion_block": None,
        "transformer": {"type": "Transformer", "encoder": {"num_layers": 0}, "decoder": {"num_layers": 0}},
    },
}
"""Changes of `tiny`'s head."""
CLASSES = {"mask classification": 3}


class FourConvolutions(nn.Module):
    """A backbone that is quick to trace."""

    channels: ClassVar = (8, 8, 8, 8)
    stride = None

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Conv2d(3, 8, kernel_size=3, stride=2**level, padding=1) for level in (2, 3, 4, 5)
        )

    def forward(self, frames: Tensor) -> list[Tensor]:
        return [level(frames) for level in self.levels]


@pytest.fixture(scope="module", autouse=True)
def backbone() -> Iterator[None]:
    MODELS.register_module(module=FourConvolutions)
    yield
    MODELS.module_dict.pop("FourConvolutions")


def config(name: str) -> Any:
    model = tiny(SMALL[name], num_classes=CLASSES.get(name, 1))
    model["backbone"] = {"type": "FourConvolutions"}
    return Config(dict(task="ms3", model=model, dataset=dict(test=dict(img_size=(32, 64)))))


def network(cfg: Any) -> Any:
    torch.manual_seed(0)
    return build_model(cfg.model).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Any, Exported]]:
    """(model, exported file) by name of the model and of the format; each is made once."""
    folder = tmp_path_factory.mktemp("exported")
    made: dict[tuple[str, str], Exported] = {}
    networks: dict[str, Any] = {}

    def make(name: str, format_name: str) -> tuple[Any, Exported]:
        networks.setdefault(name, network(config(name)))
        program = next((done.program for (other, _), done in made.items() if other == name), None)
        if (name, format_name) not in made:
            path = folder / f"{name}{FORMATS[format_name].suffix}"
            made[name, format_name] = export_model(networks[name], config(name), format_name, path, program=program)
        return networks[name], made[name, format_name]

    return make


CASES = [("mixture of experts", "pt2"), ("mixture of experts", "onnx"), ("mask classification", "pt2")]
CASES += [("mask classification", "onnx"), ("temporal", "pt2")]


@pytest.mark.parametrize(("name", "format_name"), CASES)
def test_files_agree_with_the_model_on_any_number_of_frames(exported: Any, name: str, format_name: str) -> None:
    model, done = exported(name, format_name)
    for count in (1, 4, 7):
        example = done.inputs.example(count * done.inputs.multiple, seed=9)
        with torch.no_grad():
            expected = model(*example).logits
        assert expected.std() > 1e-2  # not one value everywhere
        torch.testing.assert_close(done.run(*example), expected, rtol=0, atol=1e-3)
    assert done.difference < 1e-3


def test_a_graph_needs_none_of_this_project(exported: Any) -> None:
    _, done = exported("mixture of experts", "pt2")
    targets = {str(node.target) for node in done.program.graph.nodes if node.op == "call_function"}
    assert "aten.grid_sampler.default" in targets
    assert not [target for target in targets if "modat" in target]


def test_files_say_what_they_take_and_give(exported: Any) -> None:
    found = read_pt2(exported("mixture of experts", "pt2")[1].path)[1]
    assert found["inputs"]["frames"]["shape"] == ["N", 3, 32, 64]
    assert found["inputs"]["log_mel"] | {"meaning": ""} == {
        "shape": ["N", 1, 96, 64],
        "dtype": "float32",
        "front_end": "vggish",
        "meaning": "",
    }
    assert found["outputs"]["logits"]["shape"] == ["N", 1, 32, 64]
    assert found["threshold"] == 0.5 and found["config"]["embed_dim"] == 16
    semantic = read_onnx(exported("mask classification", "onnx")[1].path)[1]
    assert semantic["outputs"]["logits"]["shape"] == ["N", 3, 32, 64]
    assert semantic["classes"] == ["background", "class 1", "class 2"] and semantic["threshold"] is None
    clips = exported("temporal", "pt2")[1].metadata
    assert clips["inputs"]["frames"]["shape"][0] == "N (whole clips: a multiple of 3)"


def test_command_exports_and_prints_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config("temporal")
    cfg.process = dict(freeze_epochs=0, train_epochs=1)
    from model.hub import save_pretrained

    save_pretrained(network(cfg), cfg, tmp_path / "owl")
    assert main([str(tmp_path / "owl"), "--out", str(tmp_path / "owl.pt2"), "--time", "--size", "64", "32"]) == 0
    printed = capsys.readouterr().out
    assert "at most" in printed and "3 frames per call" in printed and "pt2" in printed
    assert json.loads(json.dumps(read_pt2(tmp_path / "owl.pt2")[1]["inputs"]["frames"]["shape"]))[1:] == [3, 64, 32]
    with pytest.raises(ConfigError, match="--frames 4: this model takes whole clips, multiples of 3"):
        main([str(tmp_path / "owl"), "--out", str(tmp_path / "owl.pt2"), "--time", "--frames", "4"])


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxscript":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(ConfigError, match="the format onnx needs the package onnxscript: pip install onnxscript"):
        export_model(network(config("temporal")), config("temporal"), "onnx", tmp_path / "model.onnx")


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match=r"the format aoti needs a C\+\+ compiler"):
        export_model(network(config("temporal")), config("temporal"), "aoti", tmp_path / "model.pt2")


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    cfg = config("mask classification")
    model = network(cfg)
    with pytest.raises(ConfigError, match=r"format 'tflite': .*Known: aoti, onnx, pt2"):
        export_model(model, cfg, "tflite", tmp_path / "model.tflite")
    with pytest.raises(ConfigError, match=r"suffix \.pt2"):
        export_model(model, cfg, "aoti", tmp_path / "model.so")
    with pytest.raises(ConfigError, match="frames of 33 x 64 pixels get masks of 36 x 64"):
        export_model(model, cfg, "pt2", tmp_path / "model.pt2", size=(33, 64))
    model.audio_encoder = DependsOnValues()
    with pytest.raises(ConfigError, match=r"torch\.export cannot express this model: \w+: .*data-dependent"):
        export_model(model, cfg, "pt2", tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


class DependsOnValues(nn.Module):
    """An audio encoder with a branch."""

    def forward(self, log_mel: Tensor) -> Tensor:
        mean = log_mel.mean((1, 2, 3))[:, None].expand(-1, 128)
        return mean if bool(log_mel.sum() > 0) else -mean


def test_a_file_that_differs_from_its_model_does_not_appear(exported: Any, tmp_path: Path) -> None:
    cfg = config("temporal")
    other = network(cfg)
    with torch.no_grad():
        other.head.mask_head.classify.weight.mul_(2)
    program = exported("temporal", "pt2")[1].program
    with pytest.raises(
        ConfigError, match=r"the pt2 file on 3 frames differs from the model by .* in .* % of the logits"
    ):
        export_model(other, cfg, "pt2", tmp_path / "model.pt2", program=program)
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    save_weights({"a": torch.zeros(1)}, tmp_path / "weights.pt2")
    for name in ("pt2", "onnx"):
        with pytest.raises(CheckpointError, match=r"weights\.pt2 is no "):
            FORMATS[name].read(tmp_path / "weights.pt2")
