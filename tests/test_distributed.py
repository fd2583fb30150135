"""Two processes are one process with twice the batch: weights, losses and scores."""

import csv
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from dataloader import build_dataset
from model import build_model
from model.checkpoint import load_weights
from scripts.engine.resume import LAST, read_checkpoint
from scripts.engine.task_metrics import TaskMetrics
from scripts.engine.testing import ModelPredictor
from tests.runs import FRAMES, ROOT, environment, finish, make_data, start, write_config
from utils.config import load_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Three clips to validate: of batches with one clip, the first process has two and the second has one.
    return make_data(tmp_path_factory.mktemp("drawn"), clips=(6, 3, 3))


def distributed_config(folder: Path, data: Path, task: str, processes: int) -> Path:
    return write_config(
        folder / "tiny.py",
        data,
        task,
        batch_size=2 // processes,
        # Draws differ between processes, as they should; without them the sums alone are compared.
        dropout=0.0,
        policy="all",
        # Some gradients (of key biases, for one) are zero but for rounding, of which AdamW would make full steps.
        eps=1e-3,
        process=f"devices={processes}, clip_grad_norm=1.0",
    )


def run(folder: Path, data: Path, task: str, processes: int) -> Path:
    # By a path that holds from this folder only: further processes are started from another one.
    finish(task, distributed_config(folder, data, task, processes).name, folder=folder)
    return folder / "work_dir/tiny"


def log(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def scored_alone(config: Path, weights: Path, task: str) -> dict[str, float]:
    """What one process says of these weights on the clips of validation, batch for batch as two processes read them."""
    cfg = load_config(config)
    dataset = build_dataset(cfg.dataset["val"])
    model = build_model(cfg.model)
    load_weights(model, weights)
    predictor = ModelPredictor(model, "32", torch.device("cpu"))
    scores = TaskMetrics(task, dataset.num_classes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the runs
    for clip, batch in enumerate(DataLoader(dataset, batch_size=1)):
        scores.update(predictor.logits(batch, clip), batch, clip)
    torch.set_num_threads(threads)
    return scores.scalars()


@pytest.mark.parametrize("task", FRAMES)
def test_two_processes_equal_one_with_the_doubled_batch(data: Path, tmp_path: Path, task: str) -> None:
    one, two = (run(tmp_path / str(processes), data, task, processes) for processes in (1, 2))
    alone, together = (read_checkpoint(folder / LAST)["state_dict"] for folder in (one, two))
    assert alone.keys() == together.keys()
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=1e-6, msg=lambda text: f"{name}: {text}")  # noqa: B023
    initial = read_checkpoint(one / "last.previous.ckpt")["state_dict"]
    moved = max(float((alone[name] - initial[name]).abs().max()) for name in alone if alone[name].is_floating_point())
    assert moved > 1e-4, "the comparison needs weights that have moved"
    for row, expected in zip(log(two), log(one), strict=True):
        for column, value in expected.items():
            # Of rounding, scores see the pixels that it takes across a threshold.
            limit = 2e-3 if column.startswith("val_") else 1e-6
            # The norm is of gradients whose sums over frames are rounded in another order.
            share = 1e-5 if column == "gradient_norm" else 1e-6
            near = row[column] == value or float(row[column]) == pytest.approx(float(value), rel=share, abs=limit)
            assert near, (column, row[column], value)
    for name, value in scored_alone(two.parents[1] / "tiny.py", two / LAST, task).items():
        assert float(log(two)[-1][f"val_{name}"]) == pytest.approx(value, rel=1e-9), name


@pytest.mark.skipif(not (Path(sys.prefix) / ".modat-requirements").exists(), reason="not the launchers' environment")
def test_the_command_for_several_machines_is_that_for_several_processes(data: Path, tmp_path: Path) -> None:
    alone, config = run(tmp_path / "alone", data, "ms3", 2), distributed_config(tmp_path / "machines", data, "ms3", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    machines = {"NNODES": "2", "GPUS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            ["bash", str(ROOT / "train.sh"), "ms3", str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(**machines, NODE_RANK=str(number), VIRTUAL_ENV=sys.prefix),
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    one, other = (read_checkpoint(folder / LAST)["state_dict"] for folder in (alone, config.parent / "work_dir/tiny"))
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-6)


def test_a_signal_to_the_first_process_stops_all_and_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    options = "devices=2, lr_schedule=dict(type='StepLR', step_size=1, gamma=0.5)"
    configs = [write_config(tmp_path / name / "tiny.py", data, batch_size=1, process=options) for name in ("a", "b")]
    straight, stopped = (config.parent / "work_dir/tiny" for config in configs)
    finish("ms3", configs[0])

    process = start("ms3", configs[1])
    while process.poll() is None and not (stopped / "metrics.csv").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "the run is saved in" in output
    assert 1 <= read_checkpoint(stopped / LAST)["run"]["step"] < 6

    finish("ms3", configs[1], "--resume")
    one, other = (read_checkpoint(folder / LAST)["state_dict"] for folder in (straight, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (straight / "metrics.csv").read_text() == (stopped / "metrics.csv").read_text()
