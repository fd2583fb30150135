"""Full disks, read-only folders, losses that are not finite: one sentence, and nothing good is lost."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.engine.resume import LAST, read_checkpoint
from tests.runs import finish, make_data, start, write_config

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("drawn"), tasks=("ms3",))


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 160 MB."""
    point = tmp_path / "disk"
    point.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(point)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


@needs_root
def test_a_full_disk_leaves_the_last_good_checkpoint(data: Path, tmp_path: Path, mount: Path) -> None:
    config = write_config(tmp_path / "tiny.py", data, process="checkpoint_interval=1")
    folder = mount / "tiny"
    process = start("ms3", config, f"process.work_dir={mount}", "process.train_epochs=50")
    while process.poll() is None and not (folder / LAST).exists():
        time.sleep(0.001)
    ballast = mount / "ballast"
    subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=1M"], capture_output=True, check=False)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 2, output
    assert "No space left on device" in output and "go on with --resume" in output and "Traceback" not in output
    step = read_checkpoint(folder / LAST)["run"]["step"]
    assert step >= 1
    assert not list(folder.glob(".*writing"))

    ballast.unlink()
    finish("ms3", config, "--resume", f"process.work_dir={mount}")
    assert read_checkpoint(folder / LAST)["run"]["step"] == max(6, step)


@needs_root
def test_a_read_only_work_dir_is_named_before_anything_runs(data: Path, tmp_path: Path, mount: Path) -> None:
    config = write_config(tmp_path / "tiny.py", data)
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    output = finish("ms3", config, f"process.work_dir={mount}", status=2)
    assert f"error: {mount}/tiny cannot be written (Read-only file system)" in output
    assert "process.work_dir=FOLDER" in output and "Traceback" not in output


def test_a_work_dir_that_is_a_file_is_named(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.py", data)
    (tmp_path / "file").write_text("")
    output = finish("ms3", config, f"process.work_dir={tmp_path / 'file'}", status=2)
    assert f"error: {tmp_path}/file/tiny cannot be written" in output and "Traceback" not in output


def test_a_loss_that_is_not_finite_stops_before_the_step_and_is_described(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.py", data, process="checkpoint_interval=1")
    output = finish("ms3", config, "optimizer.lr=1e30", status=2)
    folder = tmp_path / "work_dir/tiny"
    report = json.loads((folder / "nonfinite.json").read_text())
    assert f"error: the loss of step {report['step']} is not finite" in output and "Traceback" not in output
    assert report["step"] >= 1 and set(report["losses"]) == {"total", "mask_loss", "mix_loss", "balance_loss"}
    assert len(report["clips"]) == 2 and all(name in output for name in report["clips"])


def test_ctrl_c_twice_ends_at_once(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.py", data)
    process = start("ms3", config, "process.train_epochs=1000")
    while process.poll() is None and not (tmp_path / "work_dir/tiny/metrics.csv").exists():
        time.sleep(0.001)
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.002)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (1, 130), output
    assert "Traceback" not in output
