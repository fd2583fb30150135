"""train.sh, test.sh and scripts/setup.sh, as a shell runs them."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, environment, write_config

PRINTER = """
import json, os, sys
print(json.dumps(dict(arguments=sys.argv[1:], folder=os.getcwd(), prefix=sys.prefix,
    allocator={key: value for key, value in os.environ.items()
               if 'MALLOC_' in key or key in ('LD_PRELOAD', 'GLIBC_TUNABLES')},
    openmp={key: value for key, value in os.environ.items() if key.startswith(('OMP_', 'GOMP_'))})))
"""


OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def bash(
    script: Path, *arguments: object, folder: Path = ROOT, unset: tuple[str, ...] = (), **extra: str
) -> subprocess.CompletedProcess[str]:
    variables = environment(**extra)
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX", *unset):
        if name not in extra:
            variables.pop(name, None)
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The launchers over entry points that print what they were given, with an environment that is up to date."""
    root = tmp_path / "a project"
    (root / "scripts").mkdir(parents=True)
    for name in ("train.sh", "test.sh", "scripts/setup.sh", "scripts/launch.sh"):
        shutil.copy(ROOT / name, root / name)
    for name in ("train.py", "test.py"):
        (root / name).write_text(PRINTER)
    (root / "requirements.txt").write_text("# nothing\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / ".venv")], check=True)
    version = subprocess.run([root / ".venv/bin/python", "-V"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256((root / "requirements.txt").read_bytes()).hexdigest()
    (root / ".venv/.modat-requirements").write_text(f"{digest} {version}")
    return root


@pytest.mark.parametrize("name", ["train.sh", "test.sh"])
def test_without_arguments_usage_and_every_shipped_config(name: str, tmp_path: Path) -> None:
    done = bash(ROOT / name, folder=tmp_path)
    assert done.returncode == 2
    assert f"usage: bash {name} TASK CONFIG" in done.stdout
    listed = {line.strip() for line in done.stdout.splitlines() if line.startswith("  config/")}
    shipped = {
        str(path.relative_to(ROOT))
        for folder in ("s4", "ms3", "avss", "ablation")
        for path in (ROOT / "config" / folder).glob("*.py")
    }
    assert listed == shipped and shipped


@pytest.mark.parametrize("name", ["train.py", "test.py"])
def test_entry_points_explain_themselves(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / name, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "key=value" in done.stdout and "config/ms3/MoDAT_pvt2_ms3.py" in done.stdout


def test_arguments_pass_untouched_and_memory_is_kept(project: Path, tmp_path: Path) -> None:
    arguments = ["ms3", "my config.py", "process.lr_schedule=dict(type='cosine')", "--resume"]
    done = bash(project / "train.sh", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["arguments"] == arguments and seen["folder"] == str(tmp_path)
    assert seen["prefix"] == str(project / ".venv")
    assert seen["allocator"] and "MODAT_KEEP_ALLOCATOR=0" in done.stderr


def libraries(folder: Path, *names: str) -> str:
    """A PATH on which ldconfig knows these shared libraries."""
    listed = "".join(f"\t{name} (libc6,x86-64) => {folder}/{name}\n" for name in names)
    tool = folder / "ldconfig"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{listed}END\n")
    tool.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_glibc_or_tcmalloc_keeps_memory_and_what_the_user_set_stays(project: Path, tmp_path: Path) -> None:
    def told(**variables: str) -> dict[str, str]:
        found: dict[str, str] = json.loads(bash(project / "test.sh", "ms3", **variables).stdout)["allocator"]
        return found

    path = libraries(tmp_path, "libtcmalloc_minimal_debug.so.4", "libother.so.1")
    glibc = {
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
        "MALLOC_TRIM_THRESHOLD_": "8589934592",
        "MALLOC_TOP_PAD_": "268435456",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    assert told(PATH=path) == glibc
    assert told(PATH=path, MALLOC_TOP_PAD_="7") == glibc | {"MALLOC_TOP_PAD_": "7"}
    path = libraries(tmp_path, "libtcmalloc_minimal.so.4")
    preloaded = told(PATH=path)
    assert preloaded["LD_PRELOAD"] == f"{tmp_path}/libtcmalloc_minimal.so.4"
    assert preloaded["TCMALLOC_RELEASE_RATE"] == "0" and not glibc.keys() & preloaded.keys()
    assert told(PATH=path, LD_PRELOAD="mine.so") == glibc | {"LD_PRELOAD": "mine.so"}
    assert told(PATH=path, MODAT_KEEP_ALLOCATOR="0") == {}


def system(root: Path, *, allowed: str, siblings: int = 1, files: dict[str, str] | None = None) -> str:
    """A made-up /proc and /sys: CPUs by affinity, hyperthreads per core, control groups."""
    written = {
        "proc/self/status": f"Name:\tbash\nCpus_allowed_list:\t{allowed}\n",
        "sys/devices/system/cpu/online": "0-63\n",
        "proc/self/cgroup": "0::/\n",
        **{
            f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu // siblings * siblings}\n"
            for cpu in range(64)
        },
        **(files or {}),
    }
    for name, text in written.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


V2 = {"sys/fs/cgroup/cpu.max": "200000 100000\n"}
V1 = {
    "proc/self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/docker/abc\n0::/\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "350000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
}
PARENT = {
    "proc/self/cgroup": "0::/slice/job/step\n",
    "sys/fs/cgroup/slice/job/step/cpu.max": "max 100000\n",
    "sys/fs/cgroup/slice/job/cpu.max": "800000 100000\n",
    "sys/fs/cgroup/slice/cpu.max": "50000 100000\n",
}
NO_QUOTA = {
    "proc/self/cgroup": "1:cpu:/\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize(
    ("allowed", "siblings", "files", "arguments", "threads", "words"),
    [
        ("0-63", 1, V2, [], "2", "cpu: 2 threads (quota 2.0, affinity 64 of 64), passive waiting"),
        ("0-1", 1, V2, [], "2", "cpu: 2 threads (quota 2.0, affinity 2 of 64), passive waiting"),
        ("3", 1, V2, [], "1", "cpu: 1 thread (quota 2.0, affinity 1 of 64), passive waiting"),
        ("0-63", 1, V1, [], "3", "cpu: 3 threads (quota 3.5, affinity 64 of 64), passive waiting"),
        ("0-63", 1, PARENT, [], "1", "cpu: 1 thread (quota 0.5, affinity 64 of 64), passive waiting"),
        ("0-1,8-9,60", 1, NO_QUOTA, [], "5", "cpu: 5 threads (no quota, affinity 5 of 64), passive waiting"),
        ("0-31", 2, {}, [], "16", "cpu: 16 threads (no quota, affinity 32 of 64, 16 cores), passive waiting"),
        ("0-7", 1, {}, ["process.devices=3"], "2", "affinity 8 of 64; for each of 3 processes)"),
        ("0-7", 1, V2, ["process.devices=4"], "1", "cpu: 1 thread (quota 2.0, affinity 8 of 64; for each of 4"),
    ],
)
def test_threads_by_quota_affinity_cores_and_processes(
    project: Path,
    tmp_path: Path,
    allowed: str,
    siblings: int,
    files: dict[str, str],
    arguments: list[str],
    threads: str,
    words: str,
) -> None:
    root = system(tmp_path / "root", allowed=allowed, siblings=siblings, files=files)
    cpu_only = {"CUDA_VISIBLE_DEVICES": "", "MODAT_SYSTEM_ROOT": root}
    done = bash(project / "train.sh", "ms3", *arguments, unset=OPENMP, **cpu_only)
    assert json.loads(done.stdout)["openmp"] == {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    assert words in done.stderr


def test_threads_are_shared_by_the_processes_of_gpus_and_of_slurm(project: Path, tmp_path: Path) -> None:
    root = system(tmp_path / "root", allowed="0-15")

    def threads(script: str, **variables: str) -> str:
        extra = {"MODAT_SYSTEM_ROOT": root, "CUDA_VISIBLE_DEVICES": "0,1,2,3", **variables}
        done = bash(project / script, "ms3", unset=OPENMP, **extra)
        return str(json.loads(done.stdout)["openmp"]["OMP_NUM_THREADS"])

    assert threads("train.sh") == "4"
    assert threads("test.sh") == "16"
    assert threads("train.sh", SLURM_NTASKS="8", SLURM_NTASKS_PER_NODE="8") == "2"
    assert threads("train.sh", SLURM_NTASKS="8", SLURM_NTASKS_PER_NODE="8", SLURM_CPUS_PER_TASK="16") == "16"


@pytest.mark.parametrize("waiting", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "1000"}])
def test_threads_and_waiting_that_the_user_set_stay(project: Path, waiting: dict[str, str]) -> None:
    done = bash(project / "train.sh", "ms3", unset=OPENMP, OMP_NUM_THREADS="7", **waiting)
    assert json.loads(done.stdout)["openmp"] == {"OMP_NUM_THREADS": "7", **waiting}
    [(name, value)] = waiting.items()
    assert f"cpu: 7 threads (OMP_NUM_THREADS), {name}={value}" in done.stderr


def test_several_machines_need_their_number_and_the_first_ones_name(project: Path) -> None:
    done = bash(project / "train.sh", "ms3", "x.py", NNODES="2")
    assert done.returncode != 0 and "NODE_RANK, the number of this machine from 0" in done.stderr


def test_setup_only_asks_for_the_version_when_all_is_there(project: Path, tmp_path: Path) -> None:
    python, calls = project / ".venv/bin/python", tmp_path / "calls"
    real = python.resolve()
    python.unlink()
    python.write_text(f'#!/bin/sh\necho "$@" >>{calls}\nexec {real} "$@"\n')
    python.chmod(0o755)
    for _ in range(2):
        done = bash(project / "scripts/setup.sh")
        assert done.returncode == 0 and done.stdout == done.stderr == ""
    assert calls.read_text().splitlines() == ["-V"] * 2


def test_setup_makes_an_environment_and_installs_again_when_requirements_change(project: Path) -> None:
    shutil.rmtree(project / ".venv")
    first = bash(project / "scripts/setup.sh")
    assert first.returncode == 0, first.stderr
    assert "making" in first.stderr and "installing" in first.stderr
    assert (project / ".venv/bin/python").exists()
    assert bash(project / "scripts/setup.sh").stderr == ""
    (project / "requirements.txt").write_text("# nothing, differently\n")
    assert "installing" in bash(project / "scripts/setup.sh").stderr
    assert bash(project / "scripts/setup.sh").stderr == ""


def test_setup_uses_the_active_environment(project: Path, tmp_path: Path) -> None:
    shutil.move(project / ".venv", tmp_path / "mine")
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        done = bash(project / "train.sh", "ms3", **{name: str(tmp_path / "mine")})
        assert json.loads(done.stdout)["prefix"] == str(tmp_path / "mine")
    assert not (project / ".venv").exists()


def test_setup_says_what_could_not_be_installed_and_tries_again(project: Path) -> None:
    shutil.rmtree(project / ".venv")
    (project / "requirements.txt").write_text("there-is-no-such-package-of-modat==1\n")
    for _ in range(2):
        done = bash(project / "train.sh", "ms3", "x.py", PIP_NO_INDEX="1")
        assert done.returncode == 1 and done.stdout == ""
        assert "error: pip could not install" in done.stderr


def test_setup_needs_a_python_that_the_pins_know(project: Path, tmp_path: Path) -> None:
    shutil.rmtree(project / ".venv")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "cut", "sha256sum", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    done = bash(project / "scripts/setup.sh", PATH=str(tools))
    assert done.returncode == 1 and "error: no Python 3.10 to 3.13" in done.stderr


@pytest.mark.skipif(not (Path(sys.prefix) / ".modat-requirements").exists(), reason="not the launchers' environment")
def test_one_command_makes_the_data_and_trains_and_the_other_scores(tmp_path: Path) -> None:
    data = tmp_path / "data"
    config = write_config(tmp_path / "tiny.py", data, process="checkpoint_interval=0")
    options = {
        "tasks": ["ms3"],
        "drawn": True,
        "out": str(data),
        "clips": [4, 2, 2],
        "size": 64,
        "kinds": 4,
        "workers": 1,
    }
    config.write_text(config.read_text() + f"stamps = {options!r}\n")
    here = {"VIRTUAL_ENV": sys.prefix}

    done = bash(ROOT / "train.sh", "ms3", "tiny.py", "process.train_epochs=1", folder=tmp_path, **here)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "work_dir/tiny"
    for name in ("config.py", "metrics.csv", "curves.png", "last.ckpt", "MS3_best.pth"):
        assert (folder / name).stat().st_size > 0, name
    assert any((folder / "tensorboard").iterdir())
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and float(rows[-1]["val_miou"]) > 0

    weights = "work_dir/tiny/MS3_best.pth"
    done = bash(ROOT / "test.sh", "ms3", "tiny.py", weights, "--split", "val", "--save-masks", folder=tmp_path, **here)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((folder / "val_metrics.json").read_text())
    assert scores["miou"] == pytest.approx(float(rows[-1]["val_miou"]), abs=1e-6)
    assert scores["f_score_per_batch"] == pytest.approx(float(rows[-1]["val_f_score_per_batch"]), abs=1e-6)
    assert (folder / "images/val.png").stat().st_size > 0
    assert len(list((folder / "masks/val").rglob("*.png"))) == 2 * 5

    found = {}
    for sound in ("real", "silence", "noise", "shuffled"):
        done = bash(ROOT / "test.sh", "ms3", "tiny.py", weights, "--audio", sound, folder=tmp_path, **here)
        assert done.returncode == 0, done.stdout + done.stderr
        name = "test_metrics.json" if sound == "real" else f"test_{sound}_metrics.json"
        found[sound] = json.loads((folder / name).read_text())
        assert found[sound]["audio"] == sound and found[sound]["clips"] == 2
    done = bash(ROOT / "test.sh", "ms3", "tiny.py", "--oracle", folder=tmp_path, **here)
    assert done.returncode == 0, done.stdout + done.stderr
    # Objects that are seen and not heard are what keeps the oracle below 1.
    assert 0.2 < json.loads((folder / "test_oracle_metrics.json").read_text())["miou"] <= 1


def test_the_written_config_trains_the_same_again(tmp_path: Path) -> None:
    from utils.config import load_config

    config = load_config(write_config(tmp_path / "tiny.py", tmp_path), ["optimizer.lr=0.25"])
    (tmp_path / "resolved.py").write_text(config.pretty_text)
    again = load_config(tmp_path / "resolved.py", task="ms3")
    assert again.to_dict() == config.to_dict() and again.optimizer.lr == 0.25


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ms3", "nowhere.py"], "the config nowhere.py does not exist"),
        (["s4", "config/ms3/MoDAT_pvt2_ms3.py"], "is a config for ms3, not for s4"),
        (["ms3", "config/ms3/MoDAT_pvt2_ms3.py", "process.trian_epochs=3"], "did you mean 'train_epochs'"),
        (["ms3", "config/ms3/MoDAT_pvt2_ms3.py", "dataset.train.anno_csv=/nowhere.csv"], "/nowhere.csv"),
        (["ms3", "config/ms3/MoDAT_pvt2_ms3.py", "--resume", "--overwrite"], "--resume and --overwrite exclude"),
    ],
)
def test_a_users_mistake_is_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *arguments, f"process.work_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in done.stderr, done.stderr
    assert os.listdir(tmp_path) in ([], ["MoDAT_pvt2_ms3"])
