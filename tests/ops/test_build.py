"""Building never stands in the way: real processes on machines that lack one thing or another."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

# Warnings as a user sees them, then the result of the op beside the definition's.
TRY = """
import torch, ops
torch.manual_seed(0)
value, points = torch.randn(1, 6, 2, 4), torch.rand(1, 3, 2, 1, 2, 2)
weights = torch.rand(1, 3, 2, 1, 2)
out = [ops.ms_deform_attn(value, ((2, 3),), points, weights, backend=name) for name in ("auto", "auto", "torch")]
print("same" if torch.allclose(out[0], out[2]) and torch.allclose(out[1], out[2]) else "different")
"""
STATUS = """
from ops import build
status = build.load("cpu")
print("loaded" if status.path else "not loaded", status.path or status.reason)
"""


def python(code: str, cache: Path | str, **environment: str) -> subprocess.Popen:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "MODAT_OPS_CACHE": str(cache), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def wait_until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def quick_compiler(tmp_path: Path) -> dict[str, str]:
    """A compiler that notes every source it is given and compiles an empty one in its place."""
    real = shutil.which("c++")
    if real is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "empty.cpp").write_text("")
    text = f"""
case " $* " in *" --version "*) echo quick 1.0; exit 0;; *" -dumpfullversion "*) exec {real} "$@";; esac
for last; do :; done
case " $* " in
  *" -c "*) echo compiled >> {tmp_path}/log; sleep 0.3; exec {real} -fPIC -c {tmp_path}/empty.cpp -o "$last";;
esac
exec {real} "$@"
"""
    return {"CXX": script(tmp_path / "quick" / "c++", text)}


def test_without_a_compiler_it_runs_on_pytorch_and_says_why_once(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    out, err = finish(python(TRY, tmp_path / "cache", PATH=str(empty), CXX="c++"))
    assert out.strip() == "same"
    assert err.count("RuntimeWarning") == 1
    assert "c++ is not on the PATH" in err
    assert "apt install g++" in err
    assert "Traceback" not in err


def test_a_compiler_that_fails_is_quoted_with_its_whole_output(tmp_path):
    text = 'case "$*" in *--version*) echo odd 1.0; exit 0;; esac; echo "fatal error: no such luck" >&2; exit 1'
    out, err = finish(python(TRY, tmp_path / "cache", CXX=script(tmp_path / "odd-c++", text)))
    assert out.strip() == "same"
    assert err.count("RuntimeWarning") == 1
    assert "no such luck" in err
    (log,) = (tmp_path / "cache").glob("*.log")
    assert str(log) in err
    assert "no such luck" in log.read_text()
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_compiler_that_hangs_is_ended(tmp_path):
    text = 'case "$*" in *--version*) echo slow 1.0; exit 0;; esac; sleep 100'
    compiler = script(tmp_path / "slow-c++", text)
    out, err = finish(python(TRY, tmp_path / "cache", CXX=compiler, MODAT_OPS_TIMEOUT="8"))
    assert out.strip() == "same"
    assert "took over 8 s" in err


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_build_ends_with_its_process_and_the_next_one_clears_up(tmp_path, quick_compiler, kill):
    cache, note = tmp_path / "cache", tmp_path / "compiler"
    slow = f'case "$*" in *--version*) echo quick 1.0; exit 0;; esac; echo $$ > {note}; exec sleep 300'
    process = python(STATUS, cache, CXX=script(tmp_path / "slow-c++", slow))
    wait_until(lambda: note.exists() and note.read_text().strip())
    compiler = Path("/proc") / note.read_text().strip()
    assert "sleep" in (compiler / "cmdline").read_text()
    process.send_signal(kill)
    process.communicate()
    wait_until(lambda: not compiler.exists() or "\nState:\tZ" in (compiler / "status").read_text())
    assert list(cache.glob("*/"))
    assert finish(python(STATUS, cache, **quick_compiler))[0].startswith("loaded")
    assert not list(cache.glob("*/"))


def test_the_package_of_pip_install_holds_the_library(tmp_path, quick_compiler):
    site, cache = tmp_path / "site", tmp_path / "cache"
    source = shutil.copytree(ROOT / "ops", tmp_path / "source")  # all that pip has
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", site]
    subprocess.run(command, cwd=source, env={**os.environ, **quick_compiler}, check=True)
    found = f"import sys; sys.path.append({str(site)!r})\n{STATUS}"
    assert finish(python(found, cache))[0].startswith(f"loaded {site}")
    assert not list(cache.glob("*"))


def test_switched_off(tmp_path):
    out, err = finish(python(TRY, tmp_path / "cache", MODAT_OPS_BUILD="0"))
    assert out.strip() == "same"
    assert "MODAT_OPS_BUILD=0" in err


def test_two_processes_starting_together_build_once(tmp_path, quick_compiler):
    cache = tmp_path / "cache"
    both = [python(STATUS, cache, **quick_compiler) for _ in range(2)]
    results = [finish(process) for process in both]
    (library,) = cache.glob("*.so")
    assert [out.strip() for out, _ in results] == [f"loaded {library}"] * 2
    assert (tmp_path / "log").read_text().split() == ["compiled"] * 5  # each source once
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock"}  # no half-made files


def test_a_cache_that_cannot_be_written_gives_way_to_a_private_temporary_folder(tmp_path, quick_compiler):
    (tmp_path / "tmp").mkdir()
    environment = {**quick_compiler, "TMPDIR": str(tmp_path / "tmp")}
    for _ in range(2):  # found again by the second process
        out, err = finish(python(STATUS, "/proc/modat-ops", **environment))
        assert out.startswith(f"loaded {tmp_path}/tmp/modat-ops-{os.getuid()}/"), err
    assert (tmp_path / "log").read_text().split() == ["compiled"] * 5
    assert (tmp_path / "tmp" / f"modat-ops-{os.getuid()}").stat().st_mode & 0o777 == 0o700


def test_a_temporary_folder_open_to_others_is_not_trusted(tmp_path, quick_compiler):
    shared = tmp_path / "tmp" / f"modat-ops-{os.getuid()}"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    out, _ = finish(python(STATUS, "/proc/modat-ops", **quick_compiler, TMPDIR=str(tmp_path / "tmp")))
    assert out.startswith("loaded ")
    assert str(shared) + "/" not in out


def test_a_damaged_library_is_named(tmp_path, quick_compiler):
    cache = tmp_path / "cache"
    finish(python(STATUS, cache, **quick_compiler))
    (library,) = cache.glob("*.so")
    library.write_bytes(b"half a file")
    out, err = finish(python(STATUS, cache, **quick_compiler))
    assert out.startswith("not loaded")
    assert "remove it to have it built again" in err
    assert str(library) in err


def test_a_broken_nvcc_costs_the_gpu_kernel_only(tmp_path, cpu_kernel):
    if torch.version.cuda is None:
        pytest.skip("PyTorch without CUDA")
    text = (
        'case "$*" in *--version*) echo "release %s, V%s"; exit 0;; esac; echo "nvcc error: out of order" >&2; exit 1'
    )
    script(tmp_path / "cuda" / "bin" / "nvcc", text.replace("%s", torch.version.cuda))
    code = """
import torch, warnings
from ops import build, library
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 0
print(library.has_kernel("cpu"), library.has_kernel("cuda"))
"""
    from ops.build import cache_folder

    kept = tmp_path / "cache"
    shutil.copytree(cache_folder(), kept)
    out, err = finish(python(code, kept, CUDA_HOME=str(tmp_path / "cuda"), TORCH_CUDA_ARCH_LIST="9.0"))
    assert out.strip() == "True False"
    assert err.count("RuntimeWarning") == 1
    assert "building the cuda library failed" in err
    assert "check nvcc (CUDA_HOME)" in err


def test_a_toolkit_is_found_from_an_nvcc_outside_of_it(tmp_path):
    toolkit = tmp_path / "toolkit"
    script(tmp_path / "bin" / "nvcc", f"echo '#$ TOP={toolkit}' >&2")
    code = "from ops import build; print(build._toolkits())"
    out, _ = finish(python(code, tmp_path / "cache", CUDA_HOME=str(tmp_path)))
    assert out.strip() == str([str(toolkit)])
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    out, _ = finish(python(code, tmp_path / "cache", CUDA_HOME=str(tmp_path)))
    assert out.strip() == "[]"


def test_report_names_what_is_missing(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    settings = {**os.environ, "PATH": str(empty), "CXX": "c++", "MODAT_OPS_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-m", "ops", "--build"], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert "cpu   no: there is no C++ compiler" in result.stdout
    assert "torch yes" in result.stdout
    assert "Traceback" not in result.stderr
