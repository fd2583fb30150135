"""`pip install ./ops`: compiles the kernels now, for the PyTorch of this environment, into a package beside it.

ops/build.py finds that package (modat_ops_kernels) and uses it as long as PyTorch and the sources stay the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, setup  # type: ignore[import-untyped]
from setuptools.command.build_py import build_py  # type: ignore[import-untyped]

FOLDER = Path(__file__).resolve().parent
PACKAGE = "modat_ops_kernels"
# Run by the environment's own Python: pip's isolated build environment has no PyTorch.
BUILD = """
import importlib.util, os, pathlib, sys
import torch
spec = importlib.util.spec_from_file_location("modat_build", sys.argv[1])
build = importlib.util.module_from_spec(spec)
sys.modules["modat_build"] = build
spec.loader.exec_module(build)
folder = pathlib.Path(sys.argv[2])
# Installed once, perhaps run on other GPUs than this machine's.
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(build.CUDA_ARCHITECTURES))
for library in build.LIBRARIES if torch.cuda.is_available() else ("cpu",):
    try:
        build.build(library, folder / f"{library}-{build.fingerprint(library)}.so")
    except build.BuildError as error:
        if library == "cpu":
            sys.exit(f"error: {error}")
        print(f"warning: {error}", file=sys.stderr)
"""


class BuildKernels(build_py):
    """Puts the compiled libraries into the package."""

    def run(self) -> None:
        """Compile each library."""
        folder = Path(self.build_lib) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text('"""Compiled deformable attention kernels; loaded by ops/build.py."""\n')
        subprocess.run([sys.executable, "-I", "-c", BUILD, str(FOLDER / "build.py"), str(folder)], check=True)


class WithBinaries(Distribution):
    """A wheel for this platform only, whose one package is made by the build."""

    def has_pure_modules(self) -> bool:
        """Without this, build_py is not asked: there is no package among the sources."""
        return True

    def has_ext_modules(self) -> bool:
        """The libraries are no Python extensions, but as little portable."""
        return True


# Nothing is written into the sources.
workspace = tempfile.mkdtemp(prefix="modat-ops-setup-")
egg_base = os.path.join(workspace, "egg")
os.mkdir(egg_base)
setup(
    cmdclass={"build_py": BuildKernels},
    distclass=WithBinaries,
    options={"build": {"build_base": workspace}, "egg_info": {"egg_base": egg_base}},
)
