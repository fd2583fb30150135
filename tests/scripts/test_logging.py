"""What a run logs: rows, the experts' load, pictures of both, and other places than TensorBoard."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model import build_model
from model.moe import Top2Router
from scripts.engine.expert_load import ExpertLoad
from scripts.engine.folder import open_log
from scripts.engine.logging import CsvLog, RunLog
from scripts.engine.plots import read_curves, save_class_bars, save_curves, save_experts
from scripts.engine.resume import Position
from scripts.engine.trackers import import_logger, open_tracker
from tests.support import example, tiny
from utils.config import load_config
from utils.errors import ConfigError, DataError


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return build_model(tiny({}))


def test_the_load_is_the_routers_and_is_kept_only_while_it_is_watched(model: Any) -> None:
    load = ExpertLoad(model)
    assert load.columns == [f"{branch}_{item}" for branch in ("channel", "spatial") for item in (0, 1, 2, 3, "dropped")]
    log_mel, frames = example(3)
    model(log_mel, frames)
    assert load.read() == {}

    seen: list[torch.Tensor] = []
    hook = model.head.fusion_block.spatial.router.register_forward_hook(lambda *given: seen.append(given[-1].kept))
    load.watch()
    model(log_mel, frames)
    found = load.read()
    hook.remove()
    assert list(found) == load.columns
    for expert in range(4):
        assert found[f"spatial_{expert}"] == pytest.approx(float(seen[-1][..., expert].float().mean()))
    assert found["spatial_dropped"] == pytest.approx(float((~seen[-1].any(-1)).float().mean()), abs=1e-6)
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, Top2Router))
    assert load.read() == {}


def test_the_numbers_keep_their_names_where_a_strategy_flattens_the_weights(model: Any) -> None:
    load = ExpertLoad(model)
    named = list(load.columns)
    for module in model.modules():
        if isinstance(module, Top2Router):  # as FSDP does
            module.weight = torch.nn.Parameter(module.weight.detach().flatten())
    assert load.columns == named and len(named) == 2 * 5


def test_watching_changes_no_output(model: Any) -> None:
    model.eval()
    log_mel, frames = example(2)
    before = model(log_mel, frames).logits
    ExpertLoad(model).watch()
    assert torch.equal(model(log_mel, frames).logits, before)


def test_a_model_without_experts_has_no_load() -> None:
    load = ExpertLoad(build_model(tiny({"fusion_block": None})))
    load.watch()
    assert load.columns == [] and load.read() == {}


EXPERTS = ["channel_0", "channel_1", "channel_dropped"]


def experts_row(step: int) -> dict[str, float | int]:
    return {"epoch": 0, "step": step, "channel_0": 0.1 * step, "channel_1": 0.5, "channel_dropped": 0.25}


def test_both_tables_are_cut_back_and_drawn(tmp_path: Path) -> None:
    columns, experts = ["epoch", "step", "lr", "gradient_norm"], EXPERTS
    log = RunLog(tmp_path, columns, experts=experts)
    for step in (1, 2, 3):
        log.add({"epoch": 0, "step": step, "lr": 0.1, "gradient_norm": 2.0 * step})
        log.add_experts(experts_row(step))
    log.end_epoch(3)
    log.close()
    assert np.asarray(Image.open(tmp_path / "experts.png").convert("L")).std() > 5
    resumed = RunLog(tmp_path, columns, experts=experts, resume_step=2)
    assert [row["step"] for row in resumed.experts.rows()] == [1, 2] == [row["step"] for row in resumed.csv.rows()]
    resumed.close()
    RunLog(tmp_path, columns, experts=experts).close()
    assert not (tmp_path / "experts.csv").exists()  # a new run


def test_rows_of_an_earlier_version_are_kept_under_new_columns(tmp_path: Path) -> None:
    old = CsvLog(tmp_path / "metrics.csv", ["epoch", "step", "lr"])
    old.append({"epoch": 0, "step": 1, "lr": 0.5})
    new = CsvLog(tmp_path / "metrics.csv", ["epoch", "step", "lr", "gradient_norm"])
    new.keep_until(1)
    new.append({"epoch": 0, "step": 2, "lr": 0.5, "gradient_norm": 1.5})
    assert new.rows() == [{"epoch": 0, "step": 1, "lr": 0.5}, {"epoch": 0, "step": 2, "lr": 0.5, "gradient_norm": 1.5}]


def test_curves_show_rate_and_gradient_norm_where_they_are_logged(tmp_path: Path) -> None:
    with_norm, without = tmp_path / "a.csv", tmp_path / "b.csv"
    with_norm.write_text("epoch,step,lr,gradient_norm\n0,10,0.001,3.0\n0,20,0.002,1.0\n")
    without.write_text("epoch,step,lr\n0,10,0.001\n0,20,0.002\n")
    for path in (with_norm, without):
        save_curves(path, path.with_suffix(".png"))
    assert read_curves(with_norm)["gradient_norm"] == {0: 2.0}
    shown, missing = (np.asarray(Image.open(path.with_suffix(".png")).convert("L")) for path in (with_norm, without))
    assert (shown != missing).any()


def test_tables_without_experts_and_classes_without_frames_are_refused(tmp_path: Path) -> None:
    (tmp_path / "experts.csv").write_text("epoch,step\n0,10\n")
    with pytest.raises(DataError, match=r"experts\.csv: the table has no column"):
        save_experts(tmp_path / "experts.csv", tmp_path / "experts.png")
    with pytest.raises(ValueError, match="no class has a frame"):
        save_class_bars({"dog": {"iou": 0.0, "f_score": 0.0, "frames": 0}}, tmp_path / "bars.png")


def test_bars_are_drawn_for_every_class_that_occurs(tmp_path: Path) -> None:
    names = [*(f"class {i}" for i in range(70)), "$\\class$"]  # no formula of Matplotlib's, which would be an error
    values = {names[i]: {"iou": i / 71, "f_score": 1 - i / 71, "frames": i % 69} for i in range(71)}
    save_class_bars(values, tmp_path / "bars.png", title="a $\\b$")
    picture = np.asarray(Image.open(tmp_path / "bars.png").convert("RGB"))
    assert picture.shape[1] > picture.shape[0] > 800  # two columns


class StandIn(types.ModuleType):
    """A package with the interface that wandb and trackio share; it keeps what it was given."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[Any, ...]] = []

    def init(self, **options: Any) -> None:
        self.calls.append(("init", options))

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append(("log", values, step))

    def Image(self, path: str) -> str:
        return f"image of {Path(path).name}"

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_config_numbers_and_pictures_and_goes_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    service = StandIn(name)
    monkeypatch.setitem(sys.modules, name, service)
    folder = tmp_path / "run"
    folder.mkdir()
    where: dict[str, Any] = {"logger": name, "config": {"task": "ms3"}, "experts": EXPERTS}
    log = RunLog(folder, ["epoch", "step", "train_total", "val_miou"], **where)
    log.add({"epoch": 0, "step": 10, "train_total": 0.5})
    log.add_experts(experts_row(10))
    log.end_epoch(10)
    log.close()
    (_, first), *rest = service.calls
    assert first["project"] == "modat" and first["config"] == {"task": "ms3"} and "run" in first["name"]
    assert rest[0] == ("log", {"epoch": 0, "train/total": 0.5}, 10)
    assert ("log", {"experts/load": "image of experts.png"}, 10) in rest and rest[-1] == ("finish",)
    assert not (folder / "tensorboard").exists() and (folder / "metrics.csv").exists()

    key = {"wandb": "id", "trackio": "name"}[name]
    RunLog(folder, ["epoch", "step"], resume_step=10, **where).close()
    RunLog(folder, ["epoch", "step"], **where).close()
    again, anew = (call[1] for call in service.calls[len(rest) + 1 :] if call[0] == "init")
    assert again[key] == first[key] and again["resume"] == "allow" and anew[key] != first[key]


def test_a_logger_that_is_missing_or_refuses_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"process\.logger='wandb' needs the package wandb: pip install wandb"):
        import_logger("wandb")
    refusing = StandIn("trackio")
    monkeypatch.setattr(refusing, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no login")))
    monkeypatch.setitem(sys.modules, "trackio", refusing)
    with pytest.raises(ConfigError, match=r"trackio\.init failed \(RuntimeError: no login\)"):
        open_tracker("trackio", tmp_path, {}, resume=False)


def test_a_service_is_not_told_where_the_data_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = StandIn("trackio")
    monkeypatch.setitem(sys.modules, "trackio", service)
    work_dir = f"process.work_dir={tmp_path}"
    cfg = load_config("config/ms3/MoDAT_pvt2_ms3.py", ["process.logger=trackio", work_dir])
    open_log(cfg, tmp_path, Position(), "title", ["total"], []).close()
    config = service.calls[0][1]["config"]
    assert config["task"] == "ms3" and str(tmp_path) not in str(config)


def test_neither_service_is_imported_by_default(tmp_path: Path) -> None:
    assert import_logger("tensorboard") is None
    config = "config/ms3/MoDAT_pvt2_ms3.py"
    assert load_config(config).process.logger == "tensorboard"
    with pytest.raises(ConfigError, match=r"process\.logger='mlflow' is not one of 'tensorboard', 'wandb', 'trackio'"):
        load_config(config, ["process.logger=mlflow"])
