"""Parts of the engine, each by itself; whole runs are in tests/test_resume.py and tests/test_distributed.py."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from model import build_model
from model.criterion import SegmentationLoss
from scripts.engine.fabric import processes
from scripts.engine.folder import check_choice, empty, prepare_folder
from scripts.engine.logging import CsvLog
from scripts.engine.loop import evaluates, forward, targets, to_device, train_one_epoch
from scripts.engine.optimizer import build_optimizer
from scripts.engine.resume import Position, check_order, find_resumable, read_checkpoint
from scripts.engine.run import Run, train
from scripts.engine.task_metrics import BEST_FILES, SCALARS, TaskMetrics
from tests.runs import make_data, write_config
from tests.support import example, tiny
from utils.config import ProcessConfig, check_classes, load_config
from utils.errors import CheckpointError, ConfigError, DataError
from utils.files import write_atomically
from utils.reproducibility import step_seed
from utils.runtime import as_arguments, find_file, refuse_other_stamps
from utils.schedules import build_schedule


class Toy(nn.Module):
    """One weight; its output is the loss of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, log_mel: Tensor, frames: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.weight * log_mel.mean()


class ToyLoss(nn.Module):
    def forward(self, out: Tensor, masks: Tensor, flag: Tensor) -> dict[str, Tensor]:
        return {"total": out.sum(), "mask_loss": out.sum()}


def clip(value: float = 1.0, labels: list[float] | None = None) -> dict[str, Any]:
    """An item of one frame per label, whose log-mel is constant."""
    frames = len(labels or [1])
    return {
        "log_mel": torch.full((frames, 1, 96, 64), value),
        "frames": torch.zeros(frames, 3, 4, 4),
        "masks": torch.zeros(frames, 4, 4, dtype=torch.uint8),
        "gt_temporal_mask_flag": torch.tensor(labels or [1.0]),
        "vid_temporal_mask_flag": torch.ones(frames),
        "name": "clip",
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = make_data(tmp_path_factory.mktemp("drawn"), clips=(2, 1, 1), tasks=("ms3",))
    return write_config(tmp_path_factory.mktemp("config") / "tiny.py", data)


def test_a_frozen_backbone_neither_moves_nor_decays_and_moves_afterwards(config: Path, tmp_path: Path) -> None:
    cfg = load_config(config, ["process.freeze_epochs=1", "optimizer.weight_decay=0.5"])
    run = Run(cfg, tmp_path)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    at_epoch_end = {}

    def remember(*_: Any, **__: Any) -> None:
        at_epoch_end[run.position.epoch] = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}

    run.best.update = remember  # type: ignore[method-assign]
    run.fit(Console(quiet=True))
    backbone = [name for name, _ in run.model.named_parameters() if name.startswith("backbone.")]
    assert all(torch.equal(at_epoch_end[1][name], before[name]) for name in backbone)
    assert not torch.equal(at_epoch_end[1]["audio_proj.weight"], before["audio_proj.weight"])
    assert not all(torch.equal(at_epoch_end[2][name], before[name]) for name in backbone)


def test_a_run_starts_from_another_runs_weights_and_records_what_did_not_fit(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"process.work_dir={tmp_path}", "process.train_epochs=1"]
    first = train(load_config(config, overrides), "first")
    trained = read_checkpoint(first / "last.ckpt")["state_dict"]
    runs: list[Run] = []
    monkeypatch.setattr(Run, "fit", lambda run, *_, **__: runs.append(run))
    cfg = load_config(config, [*overrides, "model.head.num_queries=5"])
    folder = train(cfg, "second", init_from=first / "last.ckpt")
    weights = runs[0].model.state_dict()
    reshaped = {"head.learnable_query.weight", "head.mask_head.layers.0.weight"}
    assert {name for name, tensor in weights.items() if not torch.equal(tensor, trained[name])} == reshaped
    written = (folder / "init_from.txt").read_text()
    assert str(first / "last.ckpt") in written and "2 of another shape" in written
    assert all(name in written for name in reshaped)


@pytest.mark.parametrize("labels", [[1, 0, 0], [1, 1, 1], [0, 0, 0]])
def test_a_step_predicts_masks_for_labelled_frames_alone(labels: list[int]) -> None:
    torch.manual_seed(0)
    network = build_model(tiny({"fusion_block": {"second_policy_train": "all"}})).train()
    criterion = SegmentationLoss(num_classes=1)
    log_mel, frames = example(6)
    flag = torch.tensor([labels, labels], dtype=torch.float32)
    masks = torch.randint(0, 2, (2, 3, *frames.shape[2:]), dtype=torch.uint8)
    batch = to_device(
        {
            "log_mel": log_mel.unflatten(0, (2, 3)),
            "frames": frames.unflatten(0, (2, 3)),
            "masks": masks,
            "gt_temporal_mask_flag": flag,
            "vid_temporal_mask_flag": torch.ones(2, 3),
            "name": ["a", "b"],
        },
        torch.device("cpu"),
    )
    output = forward(network, batch, batch["labelled_indices"])
    assert len(output.logits) == (2 if labels == [1, 0, 0] else 6)
    criterion(output, *targets(batch, batch["labelled_indices"]))["total"].backward()
    found = [parameter.grad for parameter in network.parameters()]
    network.zero_grad(set_to_none=True)
    criterion(network(log_mel, frames), masks.flatten(0, 1), flag.flatten())["total"].backward()
    for grad, parameter in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_an_accumulated_step_is_a_step_of_the_mean_loss_also_where_the_epoch_ends_early() -> None:
    values = [1.0, 2.0, 6.0, 4.0, 8.0]  # accumulated by 3: means 3 and 6
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup_module(Toy())
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1.0))
    position, weights = Position(), []
    train_one_epoch(
        model,
        ToyLoss(),
        DataLoader([clip(value) for value in values], batch_size=1),  # type: ignore[arg-type]
        optimizer,
        fabric=fabric,
        position=position,
        process=vars(ProcessConfig(accumulate=3)),
        on_loss=lambda *_: None,
        on_batch=lambda *_: weights.append(model.weight.item()),
    )
    assert weights == pytest.approx([1, 1, -2, -2, -8])
    assert (position.step, position.batch) == (2, 5)


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(parameter is each for each in group["params"]))


@pytest.mark.parametrize(("factor", "rate"), [(1.0, 0.1), (4.0, 0.4)])
def test_the_learning_rate_grows_with_its_factor(factor: float, rate: float) -> None:
    cfg = {"type": "AdamW", "lr": 0.1, "weight_decay": 0.5}
    optimizer = build_optimizer(cfg, nn.Linear(2, 2), lr_factor=factor)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    assert len(optimizer.param_groups) == 1


def test_any_optimizer_of_torch_is_built_by_name() -> None:
    assert type(build_optimizer({"type": "SGD", "lr": 0.1, "momentum": 0.9}, Toy())) is torch.optim.SGD
    assert type(build_optimizer({"type": "Adagrad", "lr": 0.1}, Toy(), fused=True)) is torch.optim.Adagrad


def test_parameter_groups_have_their_rate_and_decay() -> None:
    model = nn.ModuleDict({"backbone": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "head": nn.Linear(2, 2)})
    paramwise = {"lr_factor": {"backbone": 0.1, "backbone.1": 0.5}, "decay_norm_and_bias": False}
    cfg = {"type": "AdamW", "lr": 1.0, "weight_decay": 0.3, "paramwise": paramwise}
    optimizer = build_optimizer(cfg, model, lr_factor=2.0)
    expected = {  # parameter -> (rate, decay)
        "backbone.0.weight": (0.2, 0.3),
        "backbone.0.bias": (0.2, 0.0),
        "backbone.1.weight": (1.0, 0.0),
        "backbone.1.bias": (1.0, 0.0),
        "head.weight": (2.0, 0.3),
        "head.bias": (2.0, 0.0),
    }
    for name, parameter in model.named_parameters():
        group = group_of(optimizer, parameter)
        assert (group["lr"], group["weight_decay"]) == pytest.approx(expected[name]), name


def test_validation_epochs_start_late_keep_their_interval_and_include_the_last() -> None:
    process = vars(ProcessConfig(train_epochs=14, start_eval_epoch=10, eval_interval=2))
    assert [epoch for epoch in range(14) if evaluates(process, epoch)] == [10, 12, 13]
    assert all(evaluates(vars(ProcessConfig(train_epochs=3)), epoch) for epoch in range(3))


def rates(cfg: dict[str, Any], steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_schedule(cfg, optimizer, total_steps=steps)["scheduler"]
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_warms_up_linearly_and_ends_at_its_floor() -> None:
    found = rates({"type": "cosine", "warmup_steps": 4, "min_lr": 0.1}, 104)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[54] == pytest.approx(0.55) and found[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(found[4:]))


def test_step_schedule_is_the_published_one() -> None:
    found = rates({"type": "StepLR", "step_size": 35, "gamma": 0.67}, 60)
    assert found[34] == 1.0 and found[35] == found[59] == pytest.approx(0.67)


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ({"type": "linear"}, "process.lr_schedule.type='linear'"),
        ({"type": "cosine", "warmup": 3}, "did you mean 'warmup_steps'"),
        ({"type": "StepLR", "gamma": -1}, "process.lr_schedule.gamma=-1"),
        ({"type": "StepLR", "step_size": 0}, "process.lr_schedule.step_size=0"),
        ({"type": "cosine", "min_lr": "small"}, "process.lr_schedule.min_lr='small'"),
    ],
)
def test_a_wrong_schedule_is_named(cfg: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        rates(cfg, 1)


def test_the_log_is_cut_back_to_the_step_and_torn_rows_go(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "metrics.csv", ["epoch", "step", "train_total", "val_miou"])
    for step in (1, 2, 3):
        log.append({"epoch": 0, "step": step, "train_total": 0.1 * step})
    log.append({"epoch": 0, "step": 3, "val_miou": 0.25})
    whole = log.path.read_text()
    with log.path.open("a") as file:
        file.write("1,4,0.3")
    log.keep_until(3)
    assert log.path.read_text() == whole
    assert log.rows()[2] == {"epoch": 0, "step": 3, "train_total": 0.1 * 3}
    log.keep_until(3, validation_pending=True)
    assert [row["step"] for row in log.rows()] == [1, 2, 3] and all("val_miou" not in row for row in log.rows())
    log.keep_until(1)
    assert [row["step"] for row in log.rows()] == [1]


def test_what_a_step_draws_depends_on_seed_epoch_batch_and_process() -> None:
    seeds = [step_seed(*numbers) for numbers in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]]
    assert len(set(seeds)) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(3, 1, 4) == step_seed(3, 1, 4)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, lambda file: file.write(b"good"))

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left on device.*no state was saved"):
        write_atomically(target, fail)
    assert target.read_bytes() == b"good" and list(tmp_path.iterdir()) == [target]
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"best\.pth cannot be written .*last\.ckpt holds the last good state"):
        write_atomically(tmp_path / "best.pth", fail)


def test_a_checkpoint_with_code_inside_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"run": {}, "state_dict": {}, "x": Hostile()}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


def test_weights_alone_are_no_checkpoint_of_a_run(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"Start anew with --overwrite"):
        find_resumable(tmp_path, print)
    assert find_resumable(tmp_path / "elsewhere", print) is None


def test_a_run_folder_is_reused_only_on_request(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    prepare_folder(folder, best=["best.pth"], resume=False, overwrite=False)
    (folder / "last.ckpt").write_bytes(b"x")
    (folder / "tensorboard").mkdir()
    with pytest.raises(ConfigError, match="already holds a run"):
        prepare_folder(folder, best=["best.pth"], resume=False, overwrite=False)
    with pytest.raises(ConfigError, match="exclude each other"):
        check_choice(resume=True, overwrite=True)
    for choice in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        prepare_folder(folder, best=["best.pth"], **choice)
        assert (folder / "last.ckpt").exists()
    empty(folder)
    assert list(folder.iterdir()) == []


def test_an_epoch_goes_on_only_in_its_own_order() -> None:
    order = {"dataset.train.batch_size": 2, "process.seed": 0}
    position = {"epoch": 3, "batch": 1, "order": order}
    check_order(position, order)
    check_order({**position, "batch": 0}, {**order, "process.seed": 1})
    with pytest.raises(CheckpointError, match=r"within epoch 4, begun with dataset\.train\.batch_size=2, .* is 4 now"):
        check_order(position, {**order, "dataset.train.batch_size": 4})


def test_stamps_data_of_other_options_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stamps.json").write_text(json.dumps({"kinds": 24, "size": 128, "clips": [6, 1, 1]}))
    (tmp_path / "table.csv").touch()
    cfg = {"dataset": {"train": {"anno_csv": str(tmp_path / "table.csv")}}}
    refuse_other_stamps(cfg, {"tasks": ["ms3"], "kinds": 24, "clips": (6, 1, 1)})
    with pytest.raises(DataError, match=r"made with kinds=24, and the config says stamps\.kinds=12"):
        refuse_other_stamps(cfg, {"kinds": 12})


def test_devices_come_from_torchrun_and_slurm_where_they_started_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    process = vars(ProcessConfig(devices=3, num_nodes=2))
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert processes(process, "cpu") == (3, 2)
    assert processes(vars(ProcessConfig()), "cpu") == (1, 1)
    both = vars(ProcessConfig(devices={"cpu": 2, "gpu": 1}))
    assert (processes(both, "cpu"), processes(both, "gpu")) == ((2, 1), (1, 1))
    for name, value in (("SLURM_NTASKS", "16"), ("SLURM_NNODES", "4"), ("SLURM_JOB_NAME", "train")):
        monkeypatch.setenv(name, value)
    assert processes(process, "gpu") == (4, 4)
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_WORLD_SIZE", "8"), ("GROUP_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert processes(process, "gpu") == (8, 2)


@pytest.mark.parametrize("devices", [0, -1, "many", True, 1.5])
def test_wrong_devices_are_named(monkeypatch: pytest.MonkeyPatch, devices: Any) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(ConfigError, match=r"process\.devices="):
        processes(vars(ProcessConfig(devices=devices)), "cpu")


def test_scores_name_the_same_numbers_for_training_and_test() -> None:
    torch.manual_seed(0)
    for task, classes, frames in (("ms3", 1, 5), ("avss", 4, 10)):
        scores = TaskMetrics(task, classes)
        batch = {
            "masks": torch.randint(0, max(2, classes), (2, frames, 8, 8), dtype=torch.uint8),
            "gt_temporal_mask_flag": torch.ones(2, frames),
            "vid_temporal_mask_flag": torch.ones(2, frames),
        }
        scores.update(torch.randn(2 * frames, classes, 8, 8), batch, 0)
        found = scores.scalars()
        assert tuple(found) == SCALARS[task] and all(0 <= value <= 1 for value in found.values())
        assert all(score(found) >= 0 for score in BEST_FILES[task].values())
    with pytest.raises(ConfigError, match="do not fit"):
        TaskMetrics("avss", 1)


def test_model_and_data_must_agree_in_classes() -> None:
    from mmengine.config import ConfigDict

    cfg = ConfigDict(task="avss", model={"head": {"num_classes": 1}}, dataset={"train": {"num_classes": 71}})
    with pytest.raises(ConfigError, match=r"model\.head\.num_classes=1, but dataset\.train has 71 classes"):
        check_classes(cfg)


def test_arguments_of_a_dictionary() -> None:
    options = {"tasks": ["ms3", "s4"], "size": 64, "drawn": True, "seed": None, "out_dir": "a b", "x": False}
    assert as_arguments(options) == ["--tasks", "ms3", "s4", "--size", "64", "--drawn", "--out-dir", "a b"]


def test_files_are_found_from_the_callers_folder_and_from_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    assert find_file("train.py", "the config") == tmp_path / "train.py"
    assert find_file("scripts/setup.sh", "the config").is_file()
    with pytest.raises(ConfigError, match=r"the config nowhere\.py does not exist"):
        find_file("nowhere.py", "the config")
