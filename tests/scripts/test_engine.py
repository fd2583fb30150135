"""Parts of the engine, each by itself; whole runs are in tests/test_resume.py and tests/test_distributed.py."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from model import build_model
from model.criterion import SegmentationLoss
from scripts.engine.devices import processes
from scripts.engine.evaluation import BEST_FILES, SCALARS, Scores
from scripts.engine.logging import CsvLog
from scripts.engine.loop import AVSTraining, evaluates
from scripts.engine.resume import check_order, find_resumable, read_checkpoint
from scripts.engine.run import empty, prepare_folder
from tests.model.test_contract import example, tiny
from utils.config import ProcessConfig, check_classes
from utils.errors import CheckpointError, ConfigError, DataError
from utils.files import write_atomically
from utils.reproducibility import step_seed
from utils.runtime import as_arguments, find_file, refuse_other_stamps
from utils.schedules import build_schedule


class Backboned(nn.Module):
    """Just enough of a model: two parts, one of which can be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        self.head = nn.Linear(2, 1)

    def freeze_backbone(self, freeze: bool = True) -> None:
        self.backbone.requires_grad_(not freeze)


class TrainerStub:
    current_epoch = 0
    num_training_batches = 1
    world_size = 4
    strategy = None


def module(
    tmp_path: Path, model: nn.Module | None = None, criterion: nn.Module | None = None, **process: Any
) -> AVSTraining:
    training = AVSTraining(
        model or Backboned(),  # type: ignore[arg-type]
        criterion or nn.Identity(),
        Scores("ms3", 1),
        optimizer_cfg={"type": "AdamW", "lr": 0.1, "weight_decay": 0.5, "betas": (0.9, 0.999), "eps": 1e-8},
        process=vars(ProcessConfig(**process)),
        folder=tmp_path,
    )
    training._trainer = TrainerStub()  # type: ignore[assignment]
    return training


def test_a_frozen_backbone_neither_moves_nor_decays_and_moves_afterwards(tmp_path: Path) -> None:
    training = module(tmp_path, freeze_epochs=1)
    optimizer = training.configure_optimizers()["optimizer"]
    model: Any = training.model
    start = model.backbone.weight.clone(), model.head.weight.clone()

    def step() -> None:
        optimizer.zero_grad()
        model.head(model.backbone(torch.ones(1, 2))).sum().backward()
        optimizer.step()

    step()
    assert torch.equal(model.backbone.weight, start[0]) and not torch.equal(model.head.weight, start[1])
    assert model.backbone.weight not in optimizer.state
    training.trainer.current_epoch = 1  # type: ignore[misc]
    training._begin_epoch()
    step()
    assert not torch.equal(model.backbone.weight, start[0])


@pytest.mark.parametrize("labels", [[1, 0, 0], [1, 1, 1], [0, 0, 0]])
def test_a_step_answers_for_labelled_frames_alone(tmp_path: Path, labels: list[int]) -> None:
    torch.manual_seed(0)
    network = build_model(tiny({"fusion_block": {"second_policy_train": "all"}})).train()
    criterion = SegmentationLoss(num_classes=1)
    log_mel, frames = example(6)
    flag = torch.tensor([labels, labels], dtype=torch.float32)
    batch = {
        "log_mel": log_mel.unflatten(0, (2, 3)),
        "frames": frames.unflatten(0, (2, 3)),
        "masks": torch.randint(0, 2, (2, 3, *frames.shape[2:]), dtype=torch.uint8),
        "gt_temporal_mask_flag": flag,
        "vid_temporal_mask_flag": torch.ones(2, 3),
        "name": ["a", "b"],
    }
    answered: list[int] = []
    network.register_forward_hook(lambda _module, _inputs, out: answered.append(len(out.logits)))
    training = module(tmp_path, network, criterion)
    training.trainer.world_size = 1  # type: ignore[misc]
    training.training_step(batch, 0).backward()
    found = [parameter.grad for parameter in network.parameters()]
    network.zero_grad(set_to_none=True)
    criterion(network(log_mel, frames), batch["masks"].flatten(0, 1), flag.flatten())["total"].backward()
    assert answered[0] == (2 if labels == [1, 0, 0] else 6)
    for grad, parameter in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rule", "rate"), [(None, 0.1), ("linear", 0.4)])
def test_the_learning_rate_rule(tmp_path: Path, rule: str | None, rate: float) -> None:
    optimizer = module(tmp_path, lr_scaling=rule).configure_optimizers()["optimizer"]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


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
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
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
        prepare_folder(folder, best=["best.pth"], resume=True, overwrite=True)
    for choice in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        prepare_folder(folder, best=["best.pth"], **choice)
        assert (folder / "last.ckpt").exists()
    empty(folder)
    assert list(folder.iterdir()) == []


def test_the_last_step_of_an_epoch_may_have_fewer_batches(tmp_path: Path) -> None:
    training = module(tmp_path, accumulate=3)
    training.trainer.num_training_batches = 8  # type: ignore[misc]
    # Lightning divides each loss by 3: what a batch weighs in its step is its share over 3.
    assert [training._share_of_step(batch) for batch in range(8)] == [1, 1, 1, 1, 1, 1, 1.5, 1.5]


def test_running_statistics_are_averaged_over_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = module(tmp_path, nn.Sequential(nn.BatchNorm1d(2), nn.SyncBatchNorm(2)))
    training.trainer.world_size = 2  # type: ignore[misc]
    own, shared = training.model
    own.running_mean += torch.tensor([1.0, 2.0])
    shared.running_mean += 5.0

    def with_another(value: torch.Tensor, operation: str) -> torch.Tensor:
        assert operation == "SUM"
        return value + torch.tensor([3.0, 4.0, 3.0, 3.0])  # another process's means and variances

    monkeypatch.setattr(training, "_across_processes", with_another)
    training.on_after_backward()
    assert own.running_mean.tolist() == [2.0, 3.0] and own.running_var.tolist() == [2.0, 2.0]
    assert shared.running_mean.tolist() == [5.0, 5.0]


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
    cfg = SimpleNamespace(dataset={"train": {"anno_csv": str(tmp_path / "table.csv")}})
    refuse_other_stamps(cfg, {"tasks": ["ms3"], "kinds": 24, "clips": (6, 1, 1)})
    with pytest.raises(DataError, match=r"made with kinds=24, and the config says stamps\.kinds=12"):
        refuse_other_stamps(cfg, {"kinds": 12})


def test_devices_come_from_torchrun_and_slurm_where_they_started_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    process = vars(ProcessConfig(devices=3, num_nodes=2))
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert processes(process, "cpu") == (3, 2)
    assert processes(vars(ProcessConfig()), "cpu") == (1, 1)
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
        scores = Scores(task, classes)
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
        Scores("avss", 1)


def test_model_and_data_must_agree_in_classes() -> None:
    from mmengine.config import ConfigDict

    cfg = ConfigDict(task="avss", model={"head": {"num_classes": 1}}, dataset={"train": {"num_class": 71}})
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
