"""Exported files agree with their model on numbers of frames that they were not made with."""

import contextlib
import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import onnx
import pytest
import torch
from mmengine.config import Config
from torch import Tensor, nn

from model import build_model
from model.checkpoint import save_weights
from model.hub import save_pretrained
from scripts.export import main
from scripts.exporting import Differs, check_agreement, export_model, inputs_of
from scripts.exporting.formats import FORMATS, read_onnx, read_pt2
from scripts.exporting.graph import Inputs
from tests.support import tiny
from utils.errors import CheckpointError, ConfigError
from utils.registry import MODELS

SMALL: dict[str, dict[str, Any]] = {
    "frames": {  # with MoE and MaskClassifier
        "query_generator": {"_delete_": True, "type": "RepeatGenerator"},
        "mask_head": {"_delete_": True, "type": "MaskClassifier", "hidden_dim": 8},
        "transformer": {"decoder": {"num_layers": 0}},
    },
    "clips": {  # binary, and frames influence each other
        "query_generator": {
            "num_layers": 1,
            "av_fusion": {"type": "AVFusion", "num_heads": 2, "ffn_dim": 16, "num_layers": 1, "temporal": True},
        },
        "fusion_block": None,
        "transformer": {"encoder": {"num_layers": 0}, "decoder": {"num_layers": 0}},
        "valid_indices": [3],
    },
}
"""Changes of `tiny`'s head."""
CLASSES = {"frames": 3, "clips": 1}


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
    model = tiny(SMALL[name], num_classes=CLASSES[name])
    model["backbone"] = {"type": "FourConvolutions"}
    data = dict(test=dict(img_size=(32, 64)))
    return Config(dict(task="ms3", model=model, dataset=data, process=dict(freeze_epochs=0, train_epochs=1)))


def network(cfg: Any) -> Any:
    torch.manual_seed(0)
    return build_model(cfg.model).eval()


class Made(NamedTuple):
    """A model, its files by format, and what was printed."""

    model: Any
    inputs: Inputs
    files: dict[str, Path]
    printed: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """By name: one exported from Python, one by the command, from a model folder."""
    folder = tmp_path_factory.mktemp("exported")
    cfg = config("frames")
    model, program = network(cfg), None
    files = {name: folder / f"frames{FORMATS[name].suffix}" for name in ("pt2", "onnx")}
    for name, path in files.items():
        program = export_model(model, cfg, name, path, program=program).program
    frames = Made(model, inputs_of(model, cfg), files, "")

    cfg = config("clips")
    model = network(cfg)
    save_pretrained(model, cfg, folder / "owl")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        out = ["--format", "pt2", "onnx", "--out", str(folder / "clips")]
        assert main([str(folder / "owl"), *out, "--size", "64", "32", "--time"]) == 0
    files = {name: folder / f"clips{FORMATS[name].suffix}" for name in ("pt2", "onnx")}
    clips = Made(model, inputs_of(model, cfg, (64, 32)), files, printed.getvalue())
    return {"frames": frames, "clips": clips}


@pytest.mark.parametrize("format_name", ["pt2", "onnx"])
@pytest.mark.parametrize("name", SMALL)
def test_files_agree_with_the_model_on_any_number_of_frames(made: dict[str, Made], name: str, format_name: str) -> None:
    model, inputs, files, _ = made[name]
    run, _ = FORMATS[format_name].read(files[format_name])
    for count in (1, 4, 7):
        example = inputs.example(count * inputs.multiple, seed=9)
        with torch.no_grad():
            expected = model(*example).logits
        assert expected.std() > 1e-2  # not one value everywhere
        torch.testing.assert_close(run(*example), expected, rtol=0, atol=1e-3)


def test_a_graph_needs_none_of_this_project(made: dict[str, Made]) -> None:
    graph = torch.export.load(made["frames"].files["pt2"]).graph
    targets = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert "aten.grid_sampler.default" in targets
    assert not [target for target in targets if "modat" in target]


def test_axes_have_names(made: dict[str, Made]) -> None:
    for name in SMALL:
        graph = onnx.load(made[name].files["onnx"]).graph
        values = (*graph.input, *graph.output)
        assert [value.name for value in values] == ["log_mel", "frames", "logits"]
        assert {value.type.tensor_type.shape.dim[0].dim_param for value in values} == {"N"}


def test_files_say_what_they_take_and_give(made: dict[str, Made]) -> None:
    semantic = read_onnx(made["frames"].files["onnx"])[1]
    assert semantic["inputs"]["frames"]["shape"] == ["N", 3, 32, 64]
    assert semantic["inputs"]["log_mel"]["shape"] == ["N", 1, 96, 64]
    assert semantic["inputs"]["log_mel"]["front_end"] == "vggish"
    assert semantic["outputs"]["logits"]["shape"] == ["N", 3, 32, 64]
    assert semantic["classes"] == ["background", "class 1", "class 2"] and semantic["threshold"] is None
    binary = read_pt2(made["clips"].files["pt2"])[1]
    assert binary["inputs"]["frames"]["shape"] == ["N (whole clips: a multiple of 3)", 3, 64, 32]
    assert binary["outputs"]["logits"]["shape"][1:] == [1, 64, 32]
    assert binary["threshold"] == 0.5 and binary["config"]["embed_dim"] == 16


def test_command_prints_agreement_and_times(made: dict[str, Made]) -> None:
    printed = made["clips"].printed
    assert "clips.onnx: " in printed and "at most, 0.001 is allowed" in printed
    assert "time per frame, 3 frames per call" in printed
    assert [word for word in printed.split() if word in ("model", "pt2", "onnx")][-3:] == ["model", "pt2", "onnx"]


def test_command_refuses_parts_of_clips(tmp_path: Path) -> None:
    cfg = config("clips")
    save_pretrained(network(cfg), cfg, tmp_path / "owl")
    with pytest.raises(ConfigError, match="--frames 4: this model takes whole clips, multiples of 3"):
        main([str(tmp_path / "owl"), "--out", str(tmp_path / "owl.pt2"), "--time", "--frames", "4"])
    assert not (tmp_path / "owl.pt2").exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str) -> Any:
        if name == "onnxscript":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(ConfigError, match="the format onnx needs the package onnxscript: pip install onnxscript"):
        export_model(network(config("clips")), config("clips"), "onnx", tmp_path / "model.onnx")


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match=r"the format aoti needs a C\+\+ compiler"):
        export_model(network(config("clips")), config("clips"), "aoti", tmp_path / "model.pt2")


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    cfg = config("frames")
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


def test_a_file_that_differs_from_its_model_does_not_appear(made: dict[str, Made], tmp_path: Path) -> None:
    cfg = config("clips")
    other = network(cfg)
    with torch.no_grad():
        other.head.mask_head.classify.weight.mul_(2)
    program = torch.export.load(made["clips"].files["pt2"])
    with pytest.raises(ConfigError, match=r"the pt2 file at N = 3 differs from the model by .* in .* % of the logits"):
        export_model(other, cfg, "pt2", tmp_path / "model.pt2", size=(64, 32), program=program)
    assert not list(tmp_path.iterdir())


def off_by(model: Any, amounts: list[float]) -> Any:
    """Logits of the model plus the next of the amounts in each call."""
    remaining = iter(amounts)
    return lambda *example: model(*example).logits + next(remaining)


def test_a_model_with_routers_is_tried_on_other_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config("frames")
    model = network(cfg)
    inputs = inputs_of(model, cfg)
    assert check_agreement(off_by(model, [0.1, 0.0, 1e-4]), model, inputs, "the file") == pytest.approx(1e-4, rel=0.1)
    assert "the file at N = 1 differs from the model by 0.1 at most" in capsys.readouterr().err
    with pytest.raises(Differs, match=r"by 0\.1 at most, and by more than 0\.001 in 100 % of the logits"):
        check_agreement(off_by(model, [0.1, 0.1, 0.1]), model, inputs, "the file")
    cfg = config("clips")
    model = network(cfg)
    with pytest.raises(Differs):
        check_agreement(off_by(model, [0.1, 0.0]), model, inputs_of(model, cfg), "the file")
    with pytest.raises(Differs, match="by inf at most"):
        check_agreement(off_by(model, [float("nan")]), model, inputs_of(model, cfg), "the file")


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    save_weights({"a": torch.zeros(1)}, tmp_path / "weights.pt2")
    for name in ("pt2", "onnx"):
        with pytest.raises(CheckpointError, match=r"weights\.pt2 is no "):
            FORMATS[name].read(tmp_path / "weights.pt2")
