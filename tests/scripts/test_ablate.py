"""scripts/ablate.sh: runs in order, kept over kills, compared in a table; and the leaves of the paper's study."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from model import build_model
from scripts import ablate
from scripts.ablation import execute, table
from scripts.ablation.compare import compare
from scripts.ablation.size import image_size, measure
from scripts.ablation.slurm import submit
from scripts.ablation.study import LOG, Study, is_scored, plan, read_state, share_caches, working
from scripts.engine.clip_scores import ClipScores, read_clip_scores
from tests.runs import ROOT, environment, write_config
from utils.config import load_config
from utils.errors import ConfigError, DataError

TRAIN = """
echo "train $*" >>order.txt
for word in "$@"; do case "$word" in process.work_dir=*) parent="${word#*=}" ;; esac; done
folder="$parent/$(basename "$2" .py)"
echo "GPU=${CUDA_VISIBLE_DEVICES-unset} OMP=${OMP_NUM_THREADS-unset}"
if [ -f fail ] && [[ "$folder" == *broken* ]]; then
    echo "Traceback (most recent call last):"; echo "error: the data is missing"; exit 2
fi
echo state >"$folder/last.ckpt"
if [ -f slow ]; then sleep 60; fi
echo weights >"$folder/MS3_best.pth"
"""
TEST = """
echo "test $*" >>order.txt
folder="$(dirname "$3")"
for word in "$@"; do case "$word" in process.seed=*) seed="${word#*=}" ;; esac; done
better=0; [[ "$folder" == *other* ]] && better=2
echo "{\\"miou\\": 0.$((5 + better))$seed, \\"f_score_per_batch\\": 0.8}" >"$folder/test_metrics.json"
{
    echo clip,frames,miou
    for i in 1 2 3 4 5 6 7 8 9; do echo "c$i,5,0.$((i / 2 + better))$seed"; done
} >"$folder/test_clips.csv"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with train.sh and test.sh that write what the real ones do, and say in which order."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "train.sh").write_text(TRAIN)
    (root / "test.sh").write_text(TEST)
    return root


@pytest.fixture
def configs(tmp_path: Path) -> list[str]:
    return [str(write_config(tmp_path / f"{name}.py", tmp_path)) for name in ("first", "first_other", "broken")]


def study_of(configs: list[str], tmp_path: Path, seeds: int = 2, *overrides: str) -> Study:
    work_dir = f"process.work_dir={tmp_path / 'work'}"
    study = plan(configs, seeds=seeds, task="ms3", name="parts", overrides=[work_dir, *overrides])
    share_caches(study)
    return study


def go(study: Study, project: Path, devices: tuple[execute.Device, ...] = (None,)) -> list[str]:
    said: list[str] = []
    execute.run_all(study.runs, devices, say=said.append, finished=lambda run: None, project=project)
    return said


def order(project: Path) -> list[str]:
    path = project / "order.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [f"{line.split()[0]} {Path(line.split()[2]).stem} {line.split('seed=')[1][0]}" for line in lines]


def test_runs_are_in_order_kept_and_tried_again(
    configs: list[str], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(configs, tmp_path)
    (project / "fail").touch()
    said = go(study, project)
    scored = [
        f"{script} {name} {seed}"
        for seed in (0, 1)
        for name in ("first", "first_other")
        for script in ("train", "test")
    ]
    failed = [f"train broken {seed}" for seed in (0, 1)]
    assert order(project) == [*scored[:4], failed[0], *scored[4:], failed[1]]
    assert sum("training failed (status 2): error: the data is missing" in line for line in said) == 2
    assert execute.unfinished(study.runs) == [2, 5]
    # Frozen features go by weights and input: the seeds share them.
    for run in study.runs:
        assert (run.parent / ".audio_cache").resolve() == study.folder / ".audio_cache"

    monkeypatch.setattr(table, "measured", lambda config: {"parameters": 2e6, "flops": 3e9})
    shown, notes = table.write_table(study)
    assert shown["config"].tolist() == ["first", "other", "broken"]
    assert shown["mIoU"].tolist() == ["50.5 ± 0.7", "70.5 ± 0.7", "none"]
    assert shown["seeds"].tolist() == ["2", "2", "0 of 2"]
    assert shown["difference"].tolist() == ["", "+20.0", ""] and shown["p"][1] == "0.004"
    assert [note for note in notes if note.startswith("broken, seed 1: training failed (status 2)")]
    assert "| other | 2 | 70.5 ± 0.7 | 80.0 ± 0.0 | +20.0 | +20.0 to +20.0 |" in (study.folder / "table.md").read_text()
    assert r"70.5 $\pm$ 0.7 & 80.0" in (study.folder / "table.tex").read_text()
    numbers = pd.read_csv(study.folder / "table.csv")
    assert numbers["miou_mean"][1] == pytest.approx(0.705) and numbers["seeds"].tolist() == [2, 2, 0]
    assert len(pd.read_csv(study.folder / "runs.csv")) == 4

    (project / "fail").unlink()
    assert go(study, project)[0] == "4 of 6 runs are finished and kept"
    assert order(project) == ["train broken 0", "test broken 0", "train broken 1", "test broken 1"]
    assert not execute.unfinished(study.runs)


def test_a_trained_run_without_scores_is_only_tested(configs: list[str], project: Path, tmp_path: Path) -> None:
    study = study_of(configs[:1], tmp_path, 1)
    go(study, project)
    (study.runs[0].folder / "test_clips.csv").unlink()
    order(project)
    go(study, project)
    assert order(project) == ["test first 0"]


def test_other_options_are_refused_and_lose_nothing(configs: list[str], project: Path, tmp_path: Path) -> None:
    go(study_of(configs[:1], tmp_path, 1), project)
    changed = study_of(configs[:1], tmp_path, 1, "optimizer.lr=1")
    order(project)
    (line,) = go(changed, project)
    assert "holds a run of another config or other options: name another study with --name" in line
    assert order(project) == [] and (changed.runs[0].folder / "MS3_best.pth").is_file()
    # How fast a run is computed changes no score.
    assert is_scored(study_of(configs[:1], tmp_path, 1, "process.num_workers=1").runs[0])


def test_each_gpu_has_one_run_and_its_share_of_the_cpus(
    configs: list[str], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    study = study_of(configs, tmp_path)
    go(study, project, ("0", "3"))
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    logs = "".join((run.folder / LOG).read_text() for run in study.runs)
    assert f"GPU=0 OMP={threads}" in logs and f"GPU=3 OMP={threads}" in logs
    assert not execute.unfinished(study.runs)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert execute.find_devices(None) == ["4", "7"] and execute.find_devices(1) == ["4"]
    with pytest.raises(ConfigError, match="--gpus 3: this machine has 2 GPUs"):
        execute.find_devices(3)


def test_a_run_that_another_process_holds_is_waited_for(configs: list[str], project: Path, tmp_path: Path) -> None:
    study = study_of(configs[:2], tmp_path, 1)
    said: list[str] = []
    with contextlib.ExitStack() as other:
        assert other.enter_context(working(study.runs[0])) is not None
        execute.run_all(study.runs, [None], say=said.append, finished=lambda run: other.close(), project=project)
    assert said[0] == "first, seed 0: another process works on it, and is waited for"
    assert order(project) == ["train first_other 0", "test first_other 0", "train first 0", "test first 0"]


@pytest.mark.process
def test_killed_in_the_middle_it_goes_on(configs: list[str], project: Path, tmp_path: Path) -> None:
    study = study_of(configs[:1], tmp_path, 1)
    last, log = study.runs[0].folder / "last.ckpt", study.runs[0].folder / LOG
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from scripts.ablation import execute, study;"
        "s = study.plan(sys.argv[3:4], seeds=1, task='ms3', name='parts', overrides=[sys.argv[4]]);"
        "execute.run_all(s.runs, [None], say=print, finished=lambda run: None, project=Path(sys.argv[2]))"
    )
    command = [
        sys.executable,
        "-c",
        program,
        str(ROOT),
        str(project),
        configs[0],
        f"process.work_dir={tmp_path / 'work'}",
    ]
    (project / "slow").touch()
    process = subprocess.Popen(command, env=environment(), start_new_session=True)
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    state = read_state(study.runs[0])
    assert state is not None and not state.trained and len(state.attempts) == 1
    (project / "slow").unlink()
    os.utime(last, (state.attempts[0][0] + 90, state.attempts[0][0] + 90))
    go(study, project)
    state = read_state(study.runs[0])
    assert state is not None and state.trained and is_scored(study.runs[0])
    # The killed attempt counts up to its last checkpoint.
    assert len(state.attempts) == 2 and 1.5 <= state.minutes < 2
    assert log.read_text().count("--resume") == 2


def test_a_slurm_array_has_a_task_per_unfinished_run(
    configs: list[str], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in sbatch takes the file apart as SLURM does, and a stand-in srun and bash tell what a task would run."""
    study = study_of(configs[:2], tmp_path)
    go(study_of(configs[:1], tmp_path), project)
    tools = tmp_path / "tools"
    tools.mkdir()
    stand_ins = {
        "sbatch": f'#!/bin/bash\ncp "${{@: -1}}" {tmp_path}/submitted\necho "77;cluster"\n',
        "srun": '#!/bin/bash\nprintf "%s\\n" "$@"\n',
    }
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="--slurm: there is no sbatch on the PATH"):
        submit(study, ["a"], [])
    for name, text in stand_ins.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    arguments = [*configs[:2], "--seeds", "2", "optimizer.betas=(0.9, 0.98)"]
    assert submit(study, arguments, ["--partition=gpu"]) == f"submitted {study.folder}/array.sbatch as job 77, 2 tasks"
    text = (tmp_path / "submitted").read_text()
    directives = [line.split(" ", 1)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--array=1,3", "--ntasks=1", "--gres=gpu:1", "--partition=gpu", "--signal=TERM@120"} <= set(directives)
    done = subprocess.run(
        ["bash", str(tmp_path / "submitted")], env=environment(SLURM_ARRAY_TASK_ID="3"), capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["bash", "scripts/ablate.sh", *arguments, "--only", "3"], done.stderr
    submit(study, arguments, ["--gpus-per-task=a100:1"])
    assert "--gres" not in (tmp_path / "submitted").read_text()
    (tools / "sbatch").write_text("#!/bin/bash\necho 'invalid partition' >&2\nexit 1\n")
    with pytest.raises(ConfigError, match=r"sbatch refused .*: invalid partition"):
        submit(study, arguments, [])
    go(study, project)
    assert submit(study, arguments, []) == "all runs are finished: nothing is submitted"


MISTAKES = {
    "process.seed=3": "a study has the seeds 0 to N - 1",
    "--seeds 0": "--seeds 0: give 1 or more",
    "--name a/b": "--name 'a/b': give the plain name of a folder",
    "--slurm --gpus 2": "--slurm and --gpus exclude each other",
    "--sbatch=--time=1": "add --slurm",
    "config/s4/MoDAT_pvt2_s4.py": "is of ms3 and MoDAT_pvt2_s4.py of s4: a table compares one task",
    "nowhere.py": "the config nowhere.py does not exist",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_a_sentence(words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["config/ms3/MoDAT_pvt2_ms3.py", f"process.work_dir={tmp_path}", *words.split()]
    with pytest.raises(ConfigError) as caught:
        options = ablate.parse(arguments)
        plan(options.configs, seeds=options.seeds, task=None, name=options.name, overrides=options.overrides)
    assert MISTAKES[words] in str(caught.value)


def test_two_configs_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [str(write_config(tmp_path / folder / "same.py", tmp_path)) for folder in ("a", "b")]
    with pytest.raises(ConfigError, match="have the same name"):
        plan(paths, seeds=1, task=None, name="parts", overrides=[])


def scores(*values: float) -> pd.Series:
    return pd.Series(values, index=[f"clip{index}" for index in range(len(values))])


def test_a_comparison_is_paired_over_clips_and_seeds() -> None:
    rng = np.random.default_rng(1)
    base = rng.random(60)
    first = [scores(*base), scores(*(base + 0.01 * rng.standard_normal(60)))]
    better = [scores(*(x.to_numpy() + 0.02 + 0.02 * rng.standard_normal(60))) for x in first]
    found = compare(first, better)
    # Unpaired, 0.02 would drown in the spread of the clips (0.3).
    assert found.difference == pytest.approx(np.mean([b.mean() - a.mean() for a, b in zip(first, better, strict=True)]))
    assert 0 < found.low < found.difference < found.high < 0.04 and found.p < 0.001 and found.clips == 60
    back = compare(better, first)
    assert back.difference == pytest.approx(-found.difference) and back.p == found.p
    # Half-width of the normal interval of a mean, which the bootstrap must come close to.
    noise = compare([scores(*base)], [scores(*rng.permutation(base))])
    spread = np.std(rng.permutation(base) - base)
    assert noise.low < 0 < noise.high and noise.p > 0.05
    assert (noise.high - noise.low) / 2 == pytest.approx(1.96 * spread / 60**0.5, rel=0.25)
    # The order of the clips does not matter, their names do.
    assert compare([first[0]], [better[0][::-1]]) == compare([first[0]], [better[0]])
    with pytest.raises(ValueError, match="different clips"):
        compare([scores(0.1, 0.2)], [scores(0.1, 0.2, 0.3)])
    with pytest.raises(ValueError, match="0 and 1 seeds"):
        compare([], [scores(0.1)])


def test_equal_runs_differ_by_nothing() -> None:
    same = compare([scores(0.1, 0.5)], [scores(0.1, 0.5)])
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert np.isnan(compare([scores(0.1)], [scores(0.2)]).low)


def test_clip_scores_average_to_the_split(tmp_path: Path) -> None:
    from utils.metrics import MaskIoU

    torch.manual_seed(0)
    logits, masks = torch.randn(6, 1, 8, 8), (torch.rand(6, 8, 8) > 0.5).to(torch.uint8)
    masks[4] = 0  # silent
    clips, whole = ClipScores(1), MaskIoU()
    whole.update(logits, masks)
    for index in range(3):
        part = slice(2 * index, 2 * index + 2)
        clips.add(f"name, {index}", logits[part], masks[part], torch.ones(2))
    clips.add("unlabelled", logits[:2], masks[:2], torch.zeros(2))
    clips.write(tmp_path / "clips.csv")
    read = read_clip_scores(tmp_path / "clips.csv")
    assert list(read.index) == ["name, 0", "name, 1", "name, 2"]
    assert read.mean() == pytest.approx(float(whole.compute()))
    (tmp_path / "clips.csv").write_text("name\na\n")
    with pytest.raises(DataError, match=r"clips\.csv is not a table of clips"):
        read_clip_scores(tmp_path / "clips.csv")


def test_a_semantic_clip_scores_the_classes_it_has() -> None:
    masks = torch.tensor([[[0, 3], [0, 3]]], dtype=torch.uint8)
    logits = torch.nn.functional.one_hot(torch.tensor([[[0, 3], [0, 5]]]), 71).movedim(-1, 1).float()
    clips = ClipScores(71)
    clips.add("a", logits, masks, torch.ones(1))
    # background 1, class 3 one of two pixels, class 5 wrongly found
    assert clips.rows == [("a", 1, pytest.approx((1 + 0.5 + 0) / 3))]


def test_size_counts_parameters_and_products(tmp_path: Path) -> None:
    cfg = load_config(write_config(tmp_path / "tiny.py", tmp_path))
    found = measure(cfg)
    assert found["parameters"] == sum(p.numel() for p in build_model(cfg.model).parameters())
    cfg.model.num_frames = 10
    assert measure(cfg)["flops"] == 2 * found["flops"] > 0
    assert image_size(cfg.dataset.test) == (64, 64)
    assert image_size({"type": "AVSSDataset", "crop_size": 128, "img_size": (9, 9)}) == (128, 128)


STUDY = {
    "no_avd": ("query_generator.type", "RepeatGenerator"),
    "no_av_fusion": ("query_generator.av_fusion", None),
    "channel_only": ("fusion_block.branches", "channel"),
    "spatial_only": ("fusion_block.branches", "spatial"),
    "1_expert": ("fusion_block.num_experts", 1),
    "4_experts": ("fusion_block.num_experts", 4),
    "second_all": ("fusion_block.second_policy_eval", "all"),
    "second_none": ("fusion_block.second_policy_eval", "none"),
    "second_threshold": ("fusion_block.second_policy_eval", "threshold"),
}


@pytest.mark.parametrize("base", ["MoDAT_pvt2_ms3", "MoDAT_lite0_ms3_stamps"])
def test_every_leaf_of_the_study_changes_one_thing(base: str) -> None:
    def flat(node: object, prefix: str = "") -> dict[str, object]:
        if not isinstance(node, dict):
            return {prefix[:-1]: node}
        return {key: value for name, child in node.items() for key, value in flat(child, f"{prefix}{name}.").items()}

    whole = flat(load_config(ROOT / f"config/ms3/{base}.py").to_dict())
    names = {**STUDY, "16_experts": ("fusion_block.num_experts", 16)} if "stamps" in base else STUDY
    for name, (key, value) in names.items():
        path = ROOT / f"config/ablation/{base}_{name}.py"
        cfg = load_config(path, task="ms3")
        if "stamps" in base:  # those of the full size have the same options
            with torch.device("meta"):
                build_model(cfg.model)
        leaf = flat(cfg.to_dict())
        changed = {key for key in {*whole, *leaf} if whole.get(key, "absent") != leaf.get(key, "absent")}
        block = f"model.head.{key.split('.')[0]}."
        assert changed and all(key.startswith(block) for key in changed), (name, changed)
        assert leaf[f"model.head.{key}"] == value
        assert path.read_text().startswith(f'"""bash train.sh ms3 config/ablation/{path.name}\n')
        assert len(path.read_text().splitlines()) <= 16
