"""Build, cache and load the compiled operators on first use. A missing compiler raises no error.

A library is taken from the package installed by `pip install ./ops`, else from the cache, else compiled into the cache
by torch.utils.cpp_extension in a separate process: `python ops/build.py cpu FILE [PARENT]`. That process and its
compilers end with the process PARENT; it runs this file alone, which therefore imports nothing of the project.

Environment:
    MODAT_OPS_BUILD: 0 disables building (existing libraries are still used).
    MODAT_OPS_CACHE: folder of built libraries; default: $XDG_CACHE_HOME/modat-ops, ~/.cache/modat-ops.
    MODAT_OPS_TIMEOUT: maximum seconds of a build, or of waiting for the build of another process; default 600.
    CXX: the C++ compiler; default c++.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Library = Literal["cpu", "cuda"]
LIBRARIES: tuple[Library, ...] = ("cpu", "cuda")
FOLDER = Path(__file__).resolve().parent
SOURCES: dict[Library, tuple[str, ...]] = {
    "cpu": ("library.cpp", "cpu.cpp", "cpu_portable.cpp", "cpu_avx2.cpp", "cpu_avx512.cpp"),
    "cuda": ("cuda.cpp", "cuda_kernels.cu"),
}
PREBUILT = "modat_ops_kernels"  # package installed by `pip install ./ops`
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0+PTX")
logger = logging.getLogger(__name__)


class BuildError(Exception):
    """A library is unavailable; the message holds the reason and the remedy."""


@dataclass(frozen=True)
class Status:
    """Result of loading a library: its `path`, or the `reason` of the failure."""

    path: Path | None
    reason: str = ""


@functools.cache
def load(library: Library) -> Status:
    """Load the operators of a device, building them if needed. Never raises; a failure gives one warning."""
    try:
        path = _obtain(library)
        torch.ops.load_library(str(path))
    except BuildError as error:
        reason = str(error)
    except OSError as error:  # from the dynamic linker
        reason = f"the built library does not load ({error}); remove it to have it built again"
    else:
        return Status(path)
    if not (library == "cuda" and not torch.cuda.is_available()):
        message = f"deformable attention runs on plain PyTorch, many times slower: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return Status(None, reason)


def _obtain(library: Library) -> Path:
    """File of the library, from the installed package, the cache, or a new build."""
    if library == "cuda":
        if not torch.cuda.is_available():
            raise BuildError("PyTorch sees no CUDA device")
        if load("cpu").path is None:
            raise BuildError("the cpu library, which defines the operators, is missing")
    prebuilt = _prebuilt(library)
    if prebuilt is not None:
        return prebuilt
    if sys.platform not in ("linux", "darwin"):
        raise BuildError(f"building on {sys.platform} is not supported, only on Linux and macOS")
    name = f"{library}-{tag(library)}.so"
    folder = cache_folder()
    target = folder / name
    if target.exists():
        return target
    if os.environ.get("MODAT_OPS_BUILD", "1") == "0":
        raise BuildError("MODAT_OPS_BUILD=0 disables building, and no built library was found")
    with _lock(folder / f"{name}.lock") as alone:
        for left in folder.glob(f"{target.stem}-*/") if alone else ():  # left by a killed process
            shutil.rmtree(left, ignore_errors=True)
        if not target.exists():
            build(library, target)
    return target


def _prebuilt(library: Library) -> Path | None:
    spec = importlib.util.find_spec(PREBUILT)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / f"{library}-{fingerprint(library)}.so"
    if not path.exists() and any(path.parent.glob(f"{library}-*.so")):
        logger.info("%s was built for another PyTorch or other sources: run `pip install ./ops` again", path.parent)
    return path if path.exists() else None


def build(library: Library, target: Path) -> None:
    """Compile a library into `target`, atomically.

    Raises:
        BuildError: no compiler, no nvcc, or a compiler error.
    """
    compiler = _compiler()
    if library == "cuda":
        nvcc()
    timeout = _timeout()
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("building the %s operators with %s (once, about half a minute)", library, compiler)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.stem}-") as workspace:
        result = Path(workspace) / target.name
        command = [sys.executable, str(Path(__file__).resolve()), library, str(result), str(os.getpid())]
        code, output = _run(command, timeout)
        if code != 0 or not result.exists():
            log = target.with_suffix(".log")
            log.write_text(output)
            raise BuildError(_explain(library, code, output, timeout, log))
        os.replace(result, target)


def _run(command: list[str], timeout: float) -> tuple[int | None, str]:
    """Exit code (None after a timeout) and output; compilers do not outlive this call."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            return _communicate(process, timeout)
        finally:
            _end_group(process.pid)


def _end_group(group: int) -> None:
    """Terminate a build. Compilers run in separate process groups, which ninja terminates on SIGTERM."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    _end_group(os.getpgrp())


def _communicate(process: subprocess.Popen[str], timeout: float) -> tuple[int | None, str]:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        seen = error.stdout or b""
        return None, seen.decode(errors="replace") if isinstance(seen, bytes) else seen
    return process.returncode, output


def _explain(library: Library, code: int | None, output: str, timeout: float, log: Path) -> str:
    if code is None:
        return f"building the {library} library took over {timeout:.0f} s; raise MODAT_OPS_TIMEOUT. Output: {log}"
    # PyTorch's "Error building extension" precedes the output of the compiler.
    lines = [line.strip() for line in output.splitlines() if "Error building extension" not in line]
    telling = (
        [line for line in lines if re.search(r"\b(error|fatal)\b.*:", line, re.IGNORECASE)] or lines or ["no output"]
    )
    remedy = (
        "check the compiler (CXX)" if library == "cpu" else "check nvcc (CUDA_HOME), which must match PyTorch's CUDA"
    )
    return f"building the {library} library failed: {telling[0][:300]}; {remedy}. Whole output: {log}"


def compile_here(library: Library, target: Path) -> None:
    """Compile in this process, in the folder of `target`. Called in the process started by `build`."""
    from torch.utils import cpp_extension

    os.environ["PATH"] = os.pathsep.join((*_ninja_folders(), os.environ.get("PATH", os.defpath)))
    linux = sys.platform == "linux"
    flags = ["-O3", "-w", *(["-fopenmp"] if linux else [])]
    nvcc_flags = ["-O3", "-std=c++17", "-w"]
    if library == "cuda":
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(cuda_architectures())
    toolkits = _toolkits() if library == "cuda" else []
    libraries = [f"-L{top}/{folder}" for top in toolkits for folder in ("lib64", "lib")]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="objects-") as objects:
        cpp_extension.load(
            name=f"modat_ops_{library}",
            sources=[str(FOLDER / "src" / source) for source in SOURCES[library]],
            extra_cflags=flags,
            extra_cuda_cflags=nvcc_flags,
            extra_include_paths=[f"{top}/include" for top in toolkits],
            extra_ldflags=[*(["-fopenmp", "-s"] if linux else ["-undefined", "dynamic_lookup"]), *libraries],
            build_directory=objects,
            with_cuda=library == "cuda",
            is_python_module=False,
            is_standalone=False,
        )
        os.replace(Path(objects) / f"modat_ops_{library}.so", target)


def cuda_architectures() -> list[str]:
    """TORCH_CUDA_ARCH_LIST if set, else those of the devices of this machine, else all supported ones."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    if wanted:
        return [name for name in wanted.split(";") if name]
    if not torch.cuda.is_available():
        return list(CUDA_ARCHITECTURES)
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def tag(library: Library) -> str:
    """Hash of what a cached library depends on: sources, PyTorch, compiler, processor family, CUDA architectures."""
    compiler = subprocess.run([_compiler(), "--version"], capture_output=True, text=True).stdout
    parts = [compiler, platform.machine()]
    if library == "cuda":
        parts += [str(torch.version.cuda), *cuda_architectures()]
    return f"{fingerprint(library)}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


@functools.cache
def fingerprint(library: Library) -> str:
    """PyTorch's version and a hash of the library's sources."""
    digest = hashlib.sha256()
    for path in sorted((FOLDER / "src").iterdir()):
        if library == "cuda" or not path.name.startswith("cuda"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"torch{torch.__version__}-{digest.hexdigest()[:12]}"


def _compiler() -> str:
    name = os.environ.get("CXX", "c++")
    if shutil.which(name) is None:
        raise BuildError(
            f"there is no C++ compiler ({name} is not on the PATH); install one (apt install g++, conda install "
            "gxx), or name it in CXX"
        )
    return name


def nvcc() -> str:
    """Path of the nvcc that PyTorch's build tools use.

    Raises:
        BuildError: there is none.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    compiler = Path(CUDA_HOME) / "bin" / "nvcc" if CUDA_HOME else None
    if compiler is None or not compiler.exists():
        raise BuildError(f"there is no nvcc; install the CUDA {torch.version.cuda} toolkit, or set CUDA_HOME")
    return str(compiler)


def _toolkits() -> list[str]:
    """Toolkit folders that nvcc reports, if PyTorch would not find them: nvcc may be a link or a script elsewhere."""
    compiler = Path(nvcc())
    if (compiler.parent.parent / "include" / "cuda_runtime.h").exists():
        return []
    steps = subprocess.run([compiler, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    return [line.partition("TOP=")[2].strip() for line in steps.splitlines() if "TOP=" in line]


def _ninja_folders() -> Iterator[str]:
    yield sysconfig.get_path("scripts")
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja

        yield str(ninja.BIN_DIR)


def _timeout() -> float:
    try:
        return float(os.environ.get("MODAT_OPS_TIMEOUT", "600"))
    except ValueError as error:
        raise BuildError(f"MODAT_OPS_TIMEOUT={os.environ['MODAT_OPS_TIMEOUT']!r} is not a number of seconds") from error


def cache_folder() -> Path:
    """Folder of built libraries: that of the user if writable, else a private temporary one."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    wanted = Path(os.environ.get("MODAT_OPS_CACHE") or os.path.join(home, "modat-ops"))
    with contextlib.suppress(OSError):
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    return _temporary_cache(wanted)


@functools.cache
def _temporary_cache(wanted: Path) -> Path:
    # Other users can write to the temporary folder: load libraries only from a folder that nobody else can access.
    shared = Path(tempfile.gettempdir()) / f"modat-ops-{os.getuid()}"
    with contextlib.suppress(OSError):
        shared.mkdir(mode=0o700, exist_ok=True)
        info = shared.lstat()
        if info.st_uid == os.getuid() and info.st_mode & 0o777 == 0o700 and not shared.is_symlink():
            logger.info("%s cannot be written; built operators go to %s", wanted, shared)
            return shared
    try:
        return Path(tempfile.mkdtemp(prefix="modat-ops-"))
    except OSError as error:
        raise BuildError(f"neither {wanted} nor a temporary folder can be written; set MODAT_OPS_CACHE") from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Lock against concurrent builds, released by the system when its holder dies.

    Yields False on file systems without locks: concurrent builds then cost time only, since a library is moved into
    place atomically.
    """
    import fcntl

    deadline = time.monotonic() + _timeout()
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise BuildError(f"another process has been building for too long (it holds {path})") from error
                time.sleep(0.2)
                continue
            except OSError:
                logger.info("%s cannot be locked, building without", path)
                yield False
                return
            break
        yield True


if __name__ == "__main__":
    wanted_library, wanted_target, *starter = sys.argv[1:]
    if wanted_library not in LIBRARIES:
        sys.exit(f"error: the library is one of {', '.join(LIBRARIES)}, got {wanted_library}")
    if starter:
        threading.Thread(target=_end_with, args=[int(starter[0])], daemon=True).start()
    compile_here("cpu" if wanted_library == "cpu" else "cuda", Path(wanted_target))
