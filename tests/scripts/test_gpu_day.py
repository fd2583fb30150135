"""A day with a GPU: parts, time limits, the report, and that every command is one of the project's."""

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import test as test_command
import train as train_command
from scripts.gpu_day import __main__ as gpu_day
from scripts.gpu_day import report, running, tables
from scripts.gpu_day.parts import Part, all_parts
from tests.runs import ROOT, environment
from utils.errors import ConfigError
from utils.runtime import StopRequested

# Ends with processes left behind: one that ignores SIGTERM in a session of its own, and an orphan in another.
STUBBORN = """
trap '' TERM
setsid bash -c 'trap "" TERM; echo $$ >child; while :; do sleep 0.1; done' &
setsid bash -c 'bash -c "echo \\$\\$ >orphan; while :; do sleep 0.1; done" & while [ ! -s orphan ]; do sleep 0.01; done'
while :; do sleep 0.1; done
"""
LIMITED = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from scripts.gpu_day.running import adopt_orphans, run_limited
adopt_orphans()
print(run_limited(["bash", "-c", {command!r}], Path("log"), 0.6, folder=Path("."), grace=0.2)[0])
"""


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_command_over_its_time_ends_with_all_that_it_started(tmp_path: Path) -> None:
    code = LIMITED.format(root=str(ROOT), command=STUBBORN)
    done = subprocess.run([sys.executable, "-SEc", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "None\n", done.stderr
    for name in ("child", "orphan"):
        assert not alive(int((tmp_path / name).read_text())), name
    assert "over its time of 1 s" in (tmp_path / "log").read_text()


def test_a_commands_status_and_output_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for number in (0, 3):
        status, seconds = running.run_limited(["sh", "-c", f"echo told; exit {number}"], log, 20, folder=tmp_path)
        assert status == number and 0 < seconds < 20
    assert log.read_text().count("told\n[status") == 2 and "[status 3," in log.read_text()


def part(name: str, command: str, share: float = 1, **more: Any) -> Part:
    return Part(name, f"About {name}", share, [["sh", "-c", line] for line in command.split("; then ")], **more)


@pytest.fixture
def day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., gpu_day.Day]:
    """A day of given parts and seconds."""
    monkeypatch.setattr(report, "machine", lambda: {"card 0": "a|b"})
    (tmp_path / "logs").mkdir()

    def build(parts: list[Part], seconds: float) -> gpu_day.Day:
        return gpu_day.Day(parts, tmp_path, minutes=seconds / 60, dry=False, started="today")

    return build


def test_the_report_tells_the_end_of_every_part(day: Callable[..., gpu_day.Day], tmp_path: Path) -> None:
    seen: list[str] = []

    def look() -> str:
        """What a cut within this part would have left behind."""
        seen.extend(
            f"{entry['name']} {entry['state']}" for entry in json.loads((tmp_path / "report.json").read_text())["parts"]
        )
        return "| a table |"

    def unreadable() -> str:
        raise ValueError("no such column")

    given = day(
        [
            part("first", "echo fine", summarise=lambda: "first things"),
            part("second", "echo one; then exit 4; then echo three", summarise=look),
            part("missing", "exit 0", skipped="one card"),
            part("odd", "echo odd", summarise=unreadable),
            part("long", "echo begun; sleep 30; then echo never", share=0.5),
            part("last", "echo last words", share=40),
        ],
        seconds=60,
    )
    begin = time.monotonic()
    given.run()
    assert time.monotonic() - begin < 15
    states = {entry["name"]: entry["state"] for entry in given.entries}
    ends = {"first": "done", "second": "failed", "missing": "skipped", "odd": "done", "long": "over its time"}
    assert states == {**ends, "last": "done"}
    assert seen == ["first done", "second running", *(f"{name} waiting" for name in ("missing", "odd", "long", "last"))]
    text = (tmp_path / "report.md").read_text()
    assert "# GPU day" in text and "complete" in text and "a\\|b" in text
    assert "first things" in text and "| a table |" in text and "skipped: one card" in text
    assert "its results cannot be read (ValueError: no such column)" in text
    assert "sh -c 'exit 4'  # status 4" in text and "sh -c 'echo three'  # ok" in text, "the others run all the same"
    assert "begun" in text and "last words" in text, "the log's end, where there are no results"
    assert "never" not in (tmp_path / "logs/long.log").read_text().split("begun")[-1]


def test_time_that_a_part_leaves_over_is_shared_by_the_later_ones(day: Callable[..., gpu_day.Day]) -> None:
    given = day(
        [part("a", "true"), part("b", "true"), part("gone", "true", 90, skipped="no"), part("c", "true", 2)], 400
    )
    given.run()
    limits = {entry["name"]: entry["limit"] for entry in given.entries}
    assert limits["gone"] is None
    assert [limits[name] for name in "abc"] == pytest.approx([100, 400 / 3, 400], abs=3)


def test_a_signal_leaves_what_was_done(
    day: Callable[..., gpu_day.Day], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = day([part("done", "true", summarise=lambda: "kept"), part("cut", "stop"), part("later", "true")], 60)
    real = running.run_limited

    def run_limited(command: list[str], *arguments: Any, **more: Any) -> Any:
        if command[-1] == "stop":
            arguments[0].write_text("half of it")
            gpu_day.stop(15, None)
        return real(command, *arguments, **more)

    monkeypatch.setattr(running, "run_limited", run_limited)
    with pytest.raises(StopRequested):
        given.run()
    written = json.loads((tmp_path / "report.json").read_text())
    assert [entry["state"] for entry in written["parts"]] == ["done", "interrupted", "waiting"]
    assert "ended early (StopRequested: stopped by signal 15)" in written["state"] and "kept" in str(written["parts"])
    assert "half of it" in (tmp_path / "report.md").read_text()


class Parsed(Exception):
    """The command line was taken."""


@pytest.mark.parametrize(("dry", "gpus"), [(True, 0), (False, 1), (False, 8)])
def test_every_command_is_one_of_the_projects(
    dry: bool, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = all_parts(tmp_path, dry=dry, gpus=gpus)
    assert [entry.name for entry in parts if entry.skipped] == (["nccl"] if gpus == 1 else [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parse_args = argparse.ArgumentParser.parse_args

    def stop_after_parsing(parser: argparse.ArgumentParser, *arguments: Any) -> Any:
        parse_args(parser, *arguments)
        raise Parsed

    for command in (command for entry in parts for command in entry.commands):
        if command[0] == "bash":
            parse = {"train.sh": train_command.parse, "test.sh": test_command.parse}[command[1]]
            options = parse(command[2:])
            assert (ROOT / options.config).is_file()
            continue
        assert command[:2] == [sys.executable, "-m"]
        if command[2] == "pytest":
            assert all((ROOT / path).exists() for path in command[3:] if path.startswith("tests"))
            continue
        module = importlib.import_module("ops.__main__" if command[2] == "ops" else command[2])
        monkeypatch.setattr(sys, "argv", command[2:])
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after_parsing)
        with pytest.raises(Parsed):
            module.main()
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def test_the_report_names_commands_without_this_machines_folders() -> None:
    command = [sys.executable, "-m", "ops", f"{ROOT}/config/a b.py", f"process.work_dir={ROOT}/work_dir/x"]
    assert gpu_day.told(command) == "python -m ops 'config/a b.py' process.work_dir=work_dir/x"


def test_a_dry_day_has_the_parts_of_a_real_one(tmp_path: Path) -> None:
    dry, real = (all_parts(tmp_path, dry=dry, gpus=2) for dry in (True, False))
    assert [entry.name for entry in dry] == [entry.name for entry in real][: len(dry)]
    assert [entry.name for entry in real][len(dry) :] == ["stamps-62"], "a longer run of the commands before it"
    assert [len(entry.commands) for entry in dry] == [len(entry.commands) for entry in real][: len(dry)]
    assert all("cpu" in command for entry in dry for command in entry.commands if "--device" in command)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "0.5"], "--minutes 0.5: give 1 or more"),
        (["--minutes", "nan", "--dry"], "--minutes nan"),
        (["--dry", "--parts", "kernel"], "--parts kernel: known are kernels, tests, op"),
        (["--dry"], "holds a report already: give another folder with --out"),
        ([], "PyTorch finds no GPU here"),
    ],
)
def test_wrong_requests_are_answered_in_a_sentence(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "already" in words:
        (tmp_path / "report.json").touch()
    monkeypatch.setattr(sys, "argv", ["gpu_day.sh", "--out", str(tmp_path), *arguments])
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        gpu_day.main()


JUNIT = """<testsuites><testsuite>
<testcase classname="a" name="one"/><testcase classname="a" name="two"/>
<testcase classname="a" name="bad"><failure message="0.2 is not&#10;below 0.1"/></testcase>
<testcase classname="a" name="broken"><error message="no kernel"/></testcase>
<testcase classname="a" name="left"><skipped message="no nvcc"/></testcase>
</testsuite></testsuites>"""


def test_tests_are_counted_and_failures_named(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(JUNIT)
    told = tables.tests(tmp_path / "tests.xml")
    assert told is not None and told.splitlines() == [
        "2 passed, 2 failed, 1 skipped.",
        "- skipped: no nvcc",
        "- **failed**: a.bad: 0.2 is not",
        "- **failed**: a.broken: no kernel",
    ]
    assert tables.tests(tmp_path / "missing.xml") is None


def test_tables_hold_the_numbers_of_the_benchmarks() -> None:
    row = {
        "name": "ours", "levels": "28/14/7", "frames": 10, "dtype": "float32", "forward_ms": 0.0421, "both_ms": 0.2,
        "share_of_memory_limit": [0.5, 0.25], "forward_mb": None, "both_mb": None,
    }  # fmt: skip
    assert "| 28/14/7, 10 frames, float32 | ours | 0.042 | 0.200 | 50% / 25% |  |" in str(tables.op([row]))
    results = {
        "published, float32": {"seconds": [0.3, 0.2, 0.1], "peak_mb": 900.0, "precision": "32"},
        "ours, float32": {"seconds": [0.05], "peak_mb": 300.0, "precision": "32"},
    }
    told = str(
        tables.model(
            {
                "check": {"logits": 3e-6},
                "matrix_rates": {"32": 5e13},
                "evaluation 5 x 224": {"flops": 1e12, "results": results},
            }
        )
    )
    assert "logits 3.0e-06" in told and "32 50.00" in told
    assert "| published, float32 | 200.0 | 1.00 | 10.00 | 900 |" in told
    assert "| ours, float32 | 50.0 | 4.00 | 2.50 | 300 |" in told
    measured = {"seconds": 0.1, "peak_mb": 10.0, "extra_mb": 1.0}
    found = {f"{what}, ours": measured for what in ("evaluation", "training step")}
    found |= {f"{what}, classic op": {**measured, "seconds": 0.25} for what in ("evaluation", "training step")}
    told = str(tables.classic({"32": {**found, "relative error of the logits": 2e-7}}))
    assert "| training step, 32 | 100.0 | 250.0 | 2.50 | 10 / 10 | 2.0e-07 |" in told
    assert tables.op(None) is tables.model(None) is tables.classic(None) is tables.values(None) is None


@pytest.mark.process
def test_a_dry_day_as_a_user_calls_it(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts/gpu_day.sh"), "--dry", "--parts", "classic", "--minutes", "5"]
    done = subprocess.run(
        [*command, "--out", "day"],
        cwd=tmp_path,
        env=environment(VIRTUAL_ENV=sys.prefix),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "day/report.json").read_text())
    assert written["state"] == "complete" and written["machine"]["python"]
    text = (tmp_path / "day/report.md").read_text()
    assert "its numbers mean nothing" in text and "| training step, 32 |" in text
