"""A run that is killed goes on as if nothing had happened: real processes, real signals."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import read_state_dict
from scripts.engine.resume import LAST, PREVIOUS, read_checkpoint
from tests.runs import finish, make_data, start, write_config

INTERVAL = "checkpoint_interval=1, lr_schedule=dict(type='cosine', warmup_steps=2)"
# Half of the instants are within a checkpoint write, the others somewhere after a step.
KILLS = 20 if os.environ.get("MODAT_SLOW") else 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("drawn"), tasks=("ms3",))


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps that nothing disturbed."""
    config = write_config(tmp_path_factory.mktemp("straight") / "tiny.py", data, process=INTERVAL, workers=1)
    finish("ms3", config)
    return config.parent / "work_dir/tiny"


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny.py", data, process=INTERVAL, workers=1)


def assert_same(one: Any, other: Any, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert one == other, where


def assert_same_run(folder: Path, straight: Path) -> None:
    one, other = read_checkpoint(folder / LAST), read_checkpoint(straight / LAST)
    for key in ("state_dict", "optimizer", "schedule", "precision", "best", "run"):
        assert_same(one[key], other[key], key)
    for name in ("metrics.csv", "experts.csv"):
        assert (folder / name).read_text() == (straight / name).read_text(), name
    best = (read_state_dict(run / "MS3_best.pth") for run in (folder, straight))
    assert_same(*best, "best")


def wait_for(process: subprocess.Popen[str], condition: Any) -> None:
    """Until the condition holds or the process has ended."""
    deadline = time.monotonic() + 400
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.0005)


def rows(folder: Path) -> int:
    log = folder / "metrics.csv"
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0


def signal_when(
    config: Path, number: int, condition: Any, *arguments: str, whole_group: bool = False
) -> tuple[int, str]:
    """Status and output of a run that gets a signal, its workers too or not, once a condition on its folder holds."""
    process = start("ms3", config, *arguments)
    wait_for(process, lambda: condition(config.parent / "work_dir/tiny"))
    if process.poll() is None:
        (os.killpg if whole_group else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=400)
    return process.returncode, output


@pytest.mark.parametrize("instant", range(KILLS))
def test_a_killed_run_goes_on_to_the_same_weights_and_log(config: Path, straight: Path, instant: int) -> None:
    rng = random.Random(instant)
    row, delay = rng.randrange(0, 8), rng.random() * 0.4
    writing = [row]

    def within_a_write(folder: Path) -> bool:
        temporary = folder / f".{LAST}.writing"
        return rows(folder) >= writing[0] and temporary.exists() and temporary.stat().st_size > 0

    def after_a_step(folder: Path) -> bool:
        if rows(folder) < row:
            return False
        time.sleep(delay)
        return True

    process_ended, _ = signal_when(config, signal.SIGKILL, after_a_step if instant % 2 else within_a_write)
    assert process_ended in (-signal.SIGKILL, 0)
    finish("ms3", config, "--resume")
    assert_same_run(config.parent / "work_dir/tiny", straight)


@pytest.mark.parametrize("whole_group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_between_two_steps_and_says_so(
    config: Path, straight: Path, number: int, whole_group: bool
) -> None:
    """A terminal and a scheduler send it to the whole process group."""
    folder = config.parent / "work_dir/tiny"
    status, output = signal_when(
        config,
        number,
        lambda folder: rows(folder) >= 1,
        "process.checkpoint_interval=0",
        whole_group=whole_group,
    )
    assert status == 128 + number
    assert f"stopped by signal {int(number)}: the run is saved in" in output and "--resume" in output
    assert "Traceback" not in output
    assert 1 <= read_checkpoint(folder / LAST)["run"]["step"] < 6
    finish("ms3", config, "--resume")
    assert_same_run(folder, straight)


def test_a_signal_within_the_validation_saves_and_the_validation_is_done_again(config: Path, straight: Path) -> None:
    folder = config.parent / "work_dir/tiny"
    # Three training rows and no validation row: the run is in its first validation, or about to be.
    status, _ = signal_when(config, signal.SIGTERM, lambda folder: rows(folder) >= 3, "process.checkpoint_interval=0")
    assert status == 128 + signal.SIGTERM
    assert read_checkpoint(folder / LAST)["run"]["step"] == 3
    finish("ms3", config, "--resume")
    assert_same_run(folder, straight)


def test_a_checkpoint_cut_in_half_falls_back_to_the_one_before(config: Path, straight: Path) -> None:
    folder = config.parent / "work_dir/tiny"
    signal_when(config, signal.SIGKILL, lambda folder: rows(folder) >= 5 and (folder / PREVIOUS).exists())
    with (folder / LAST).open("r+b") as file:
        file.truncate((folder / LAST).stat().st_size // 2)
    output = finish("ms3", config, "--resume")
    assert f"{LAST} is not a readable checkpoint" in output and f"Going on from the one before, {PREVIOUS}" in output
    assert_same_run(folder, straight)


def test_two_broken_checkpoints_are_an_error_with_a_way_out(config: Path) -> None:
    folder = config.parent / "work_dir/tiny"
    folder.mkdir(parents=True)
    (folder / LAST).write_bytes(b"no checkpoint")
    (folder / PREVIOUS).write_bytes(b"")
    output = finish("ms3", config, "--resume", status=2)
    assert "error:" in output and "--overwrite" in output and "Traceback" not in output


def test_a_used_folder_is_refused_without_resume_or_overwrite(config: Path, straight: Path) -> None:
    folder = config.parent / "work_dir/tiny"
    shutil.copytree(straight, folder)
    before = (folder / LAST).stat().st_mtime_ns
    output = finish("ms3", config, status=2)
    assert "already holds a run" in output and "--resume" in output and "--overwrite" in output
    assert (folder / LAST).stat().st_mtime_ns == before


def test_resuming_a_finished_run_leaves_it_as_it_is(config: Path, straight: Path) -> None:
    folder = config.parent / "work_dir/tiny"
    shutil.copytree(straight, folder)
    finish("ms3", config, "--resume")
    assert_same_run(folder, straight)


def test_a_longer_run_goes_on_from_a_finished_one(config: Path, straight: Path) -> None:
    folder = config.parent / "work_dir/tiny"
    shutil.copytree(straight, folder)
    finish("ms3", config, "--resume", "process.train_epochs=3")
    run = read_checkpoint(folder / LAST)["run"]
    assert (run["epoch"], run["batch"], run["validation_pending"], run["step"]) == (3, 0, False, 9)
    kept = (straight / "metrics.csv").read_text()
    assert (folder / "metrics.csv").read_text().startswith(kept)


def test_a_run_of_another_model_is_refused_and_left_as_it_is(config: Path, straight: Path) -> None:
    folder = config.parent / "work_dir/tiny"
    shutil.copytree(straight, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    output = finish("ms3", config, "--resume", "process.train_epochs=3", "model.head.num_queries=7", status=2)
    assert f"{LAST} does not fit the model" in output and "learnable_query" in output and "Traceback" not in output
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
