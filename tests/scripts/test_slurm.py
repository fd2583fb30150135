"""Job files for SLURM, run against stand-ins for sbatch, srun and scontrol on this machine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.engine.fabric import build_fabric
from scripts.engine.resume import LAST, read_checkpoint
from scripts.engine.run import Run
from tests.runs import ROOT, environment, write_config
from utils.config import ProcessConfig
from utils.errors import ConfigError
from utils.runtime import StopRequested

EIGHT = ROOT / "scripts/slurm/eight_gpus.sbatch"
FILES = sorted((ROOT / "scripts/slurm").glob("*.sbatch"))

# Starts the tasks, each in a session of its own; hands a signal on to every process of them, as SLURM's daemon does;
# ends all KILL_WAIT seconds after one fails; exits with the highest status.
SRUN = f"""#!{sys.executable} -SE
import os, signal, subprocess, sys, time
command = sys.argv[1:]
assert command[0] == "--kill-on-bad-exit=1", command
count, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
per_node = count // nodes
tasks = []
def hand_on(number, frame):
    for task in tasks:
        try:
            os.killpg(task.pid, number)
        except ProcessLookupError:
            pass
signal.signal(signal.SIGUSR1, hand_on)
signal.signal(signal.SIGTERM, hand_on)
for rank in range(count):
    place = dict(SLURM_PROCID=rank, SLURM_LOCALID=rank % per_node, SLURM_NODEID=rank // per_node, SLURM_STEP_ID=0)
    variables = {{**os.environ, **{{key: str(value) for key, value in place.items()}}}}
    tasks.append(subprocess.Popen(command[1:], env=variables, start_new_session=True))
failed = None
while any(task.poll() is None for task in tasks):
    if failed is None and any(task.poll() for task in tasks):
        failed = time.monotonic()
    if failed is not None and time.monotonic() >= failed + float(os.environ["KILL_WAIT"]):
        hand_on(signal.SIGKILL, None)
    time.sleep(0.001)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1" in
show) echo 127.0.0.1 ;;
requeue) echo "$2" >>"$REQUEUED" ;;
esac
"""
# What `bash train.sh` is replaced with where no training is needed: a task that saves on a signal.
TASK = """
trap 'echo "$SLURM_PROCID saved"; exit {status}' USR1 TERM
touch "$READY.$SLURM_PROCID"
while :; do sleep 0.01; done
"""


class Cluster:
    """Runs job files: `sbatch` for one start of a job, which the caller may signal and queue again.

    Args:
        folder: where the stand-ins, copies of job files and logs go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.restarts = folder, 0
        self.requeued = folder / "requeued"
        (folder / "bin").mkdir(parents=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            path = folder / "bin" / name
            path.write_text(text)
            path.chmod(0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])

    def sbatch(
        self, file: Path, *arguments: object, nodes: int, per_node: int, submitted_from: Path = ROOT, **extra: str
    ) -> subprocess.Popen[str]:
        """Start a job on other numbers of nodes and tasks per node than the file's, as sbatch's options say."""
        spooled = self.folder / "slurm_script"  # SLURM runs a copy from its own folder
        shutil.copy(file, spooled)
        options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", file.read_text(), re.MULTILINE))
        slurm = {
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": options["job-name"],
            "SLURM_JOB_NODELIST": "here[1-2]",
            "SLURM_NTASKS": str(nodes * per_node),
            "SLURM_NTASKS_PER_NODE": str(per_node),
            "SLURM_NNODES": str(nodes),
            "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
            "SLURM_SUBMIT_DIR": str(submitted_from),
            "SLURM_RESTART_COUNT": str(self.restarts),
            "MASTER_PORT": self.port,
            "REQUEUED": str(self.requeued),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "VIRTUAL_ENV": sys.prefix,
            "KILL_WAIT": "0",
            **extra,
        }
        return subprocess.Popen(
            ["bash", str(spooled), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(**slurm),
        )


def wait_for(job: subprocess.Popen[str], condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 200
    while job.poll() is None and not condition():
        assert time.monotonic() < deadline, "the job did not get there"
        time.sleep(0.001)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "cluster")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder with the real job files, whose train.sh a test writes."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "scripts/slurm", folder / "scripts/slurm")
    return folder


def full_job(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that trains in the tasks of a job."""
    lacking = not (Path(sys.prefix) / ".modat-requirements").exists()
    skipped: Callable[..., None] = pytest.mark.skipif(lacking, reason="not the launchers' environment")(test)
    marked: Callable[..., None] = pytest.mark.process(skipped)
    return marked


def small_config(folder: Path, data: Path) -> Path:
    options = "lr_schedule=dict(type='cosine', warmup_steps=1)"
    return write_config(folder / "tiny.py", data, batch_size=1, workers=1, process=options)


def train_until_preempted(cluster: Cluster, config: Path) -> None:
    """Start a job of two processes, and send it SIGUSR1 after its first step."""
    folder = config.parent / "work_dir/tiny"
    job = cluster.sbatch(EIGHT, "ms3", config, nodes=1, per_node=2)
    wait_for(job, (folder / "metrics.csv").exists)
    job.send_signal(signal.SIGUSR1)  # to the shell of the job alone, as --signal=B:USR1@300 says
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 128 + signal.SIGUSR1, output
    assert output.count("2 processes (cpu)") == 1, "one process speaks for all"
    assert "stopped by signal 10: the run is saved in" in output and "Traceback" not in output
    assert cluster.requeued.read_text() == "4711\n"
    position = read_checkpoint(folder / LAST)["run"]
    assert 1 <= position["step"] < 4 and position["order"]["the number of processes"] == 2


@full_job
def test_a_preempted_job_of_two_processes_saves_and_is_queued_again(
    cluster: Cluster, drawn: Path, tmp_path: Path
) -> None:
    train_until_preempted(cluster, small_config(tmp_path, drawn))


@pytest.mark.slow
@pytest.mark.skipif("MODAT_SLOW" not in os.environ, reason="six starts of PyTorch: set MODAT_SLOW=1")
@full_job
def test_a_job_that_was_queued_again_ends_with_the_same_weights(cluster: Cluster, drawn: Path, tmp_path: Path) -> None:
    straight, stopped = (small_config(tmp_path / name, drawn) for name in "ab")
    job = cluster.sbatch(EIGHT, "ms3", straight, nodes=1, per_node=2)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    assert not cluster.requeued.exists()

    train_until_preempted(cluster, stopped)
    cluster.restarts += 1
    job = cluster.sbatch(EIGHT, "ms3", stopped, nodes=1, per_node=2)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0 and "going on at epoch" in output, output
    expected, found = (read_checkpoint(config.parent / "work_dir/tiny" / LAST) for config in (straight, stopped))
    assert found["run"]["step"] == 4
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(tensor, found["state_dict"][name]), name
    logs = [(config.parent / "work_dir/tiny/metrics.csv").read_text() for config in (straight, stopped)]
    assert logs[0] == logs[1]


def test_no_process_ends_before_the_first_has_written_the_state(tmp_path: Path) -> None:
    """srun ends all tasks when one fails, and a stopped one counts as failed."""
    waited: list[str] = []
    run = object.__new__(Run)
    run.folder, run.fabric = tmp_path, SimpleNamespace(barrier=lambda: waited.append("here"))  # type: ignore[assignment]
    with pytest.raises(StopRequested) as stopped:
        run._stop(signal.SIGUSR1)
    assert waited == ["here"] and stopped.value.saved == tmp_path / LAST


@pytest.mark.parametrize(
    ("number", "status", "again"),
    [
        (signal.SIGUSR1, 128 + signal.SIGUSR1, True),  # stopped and saved
        (signal.SIGUSR1, 0, False),  # was at its end anyway
        (signal.SIGUSR1, 2, False),  # an error would come again
        (signal.SIGTERM, 128 + signal.SIGTERM, False),  # SLURM queues preempted jobs again, and cancelled ones not
    ],
)
def test_what_has_been_stopped_for_time_alone_is_queued_again(
    cluster: Cluster, project: Path, tmp_path: Path, number: int, status: int, again: bool
) -> None:
    (project / "train.sh").write_text(TASK.format(status=status))
    file, ready = project / "scripts/slurm/four_nodes.sbatch", tmp_path / "ready"
    job = cluster.sbatch(file, nodes=2, per_node=1, submitted_from=project, READY=str(ready), KILL_WAIT="30")
    wait_for(job, lambda: all(Path(f"{ready}.{rank}").exists() for rank in range(2)))
    job.send_signal(number)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == status, output
    assert "saved" in output
    assert cluster.requeued.exists() == again == ("queued again" in output)


def test_every_job_file_asks_for_its_signal_and_starts_a_task_per_gpu(cluster: Cluster, project: Path) -> None:
    (project / "train.sh").write_text(
        'echo "$SLURM_PROCID of $SLURM_NTASKS at $MASTER_ADDR: $*, $SRUN_CPUS_PER_TASK"\n'
    )
    assert [file.stem for file in FILES] == ["eight_gpus", "four_nodes", "one_gpu"]
    for file in FILES:
        text = file.read_text()
        options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
        # SLURM reads options up to the first line of the script proper.
        assert text.index("set -euo") > text.rindex("#SBATCH")
        assert options["signal"] == "B:USR1@300" and "requeue" in options and options["open-mode"] == "append"
        assert options["gpus-per-node"] == options["ntasks-per-node"], "a task per GPU, each of which sees all of them"
        nodes, per_node = int(options["nodes"]), int(options["ntasks-per-node"])
        job = cluster.sbatch(
            file, "ms3", "x.py", "a=1", nodes=nodes, per_node=per_node, submitted_from=project, PYTHONUNBUFFERED="1"
        )
        output, _ = job.communicate(timeout=60)
        assert job.returncode == 0, output
        told = sorted(output.splitlines())[: nodes * per_node]
        expected = [
            f"{rank} of {nodes * per_node} at 127.0.0.1: ms3 x.py a=1 --resume, 8" for rank in range(nodes * per_node)
        ]
        assert sorted(told) == sorted(expected)


def launched(**variables: str) -> subprocess.CompletedProcess[str]:
    """What the launchers do with these variables, up to the start of a process."""
    script = (
        f'source "{ROOT}/scripts/launch.sh"; source() {{ MODAT_PYTHON=echo; }}; exec() {{ "$@"; }}\n'
        'modat_launch train.py ms3 x.py process.devices=5; echo "processes $(modat_processes process.devices=5)"'
    )
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, env=environment(**variables)
    )


SLURM = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NAME": "modat"}


def test_a_task_of_srun_starts_no_processes_of_its_own() -> None:
    done = launched(**SLURM, SLURM_STEP_ID="0", SLURM_CPUS_PER_TASK="2", NNODES="4")
    assert "torch.distributed.run" not in done.stdout and "processes 1" in done.stdout, done


def test_a_job_with_several_tasks_asks_for_srun() -> None:
    done = launched(**SLURM)
    assert done.returncode == 2 and "the job has 8 tasks" in done.stderr and "srun bash train.sh" in done.stderr


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_an_interactive_allocation_is_a_machine_like_any_other(name: str) -> None:
    done = launched(**SLURM | {"SLURM_JOB_NAME": name})
    assert done.returncode == 0 and "processes 5" in done.stdout, done


def test_torchrun_within_a_job_is_used_where_the_number_of_the_machine_is_given() -> None:
    done = launched(**SLURM, SLURM_STEP_ID="0", NNODES="4", NODE_RANK="2", MASTER_ADDR="first")
    assert "torch.distributed.run --nnodes 4 --node-rank 2" in done.stdout, done


def test_tasks_that_are_not_counted_per_node_are_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(ConfigError, match=r"--ntasks-per-node=2"):
        build_fabric(vars(ProcessConfig()))
