"""The formats: how a traced model is written, and how a written one is read and run."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from scripts.exporting.graph import UNSUPPORTED, reason
from utils.errors import CheckpointError, ConfigError
from utils.optional import import_optional

OPSET = 20
"""Of ONNX; the first with the GridSample that torch's exporter writes for any number of dimensions."""
METADATA = "metadata.json"
"""Name of the metadata inside a .pt2 file; in an ONNX file and an AOTInductor package the key is 'metadata'."""

Run = Callable[[Tensor, Tensor], Tensor]
"""(log_mel, frames) -> logits."""


class Format(NamedTuple):
    """A format.

    Attributes:
        suffix: of its files.
        write: (program, path, metadata) -> None.
        read: path -> (run, metadata).
        check: raises ConfigError where a package or a compiler is missing; called before the model is traced.
    """

    suffix: str
    write: Callable[[ExportedProgram, Path, Mapping[str, Any]], None]
    read: Callable[[Path], tuple[Run, dict[str, Any]]]
    check: Callable[[], None]


def write_pt2(program: ExportedProgram, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write torch.export's own file: `torch.export.load(path).module()(log_mel, frames)` runs it.

    Raises:
        ConfigError: it cannot be written, for example for want of disk.
    """
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        try:
            torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})
        except RuntimeError as error:  # also of a full disk
            raise ConfigError(f"torch.export cannot write this model: {reason(error)}.") from error


def read_pt2(path: Path) -> tuple[Run, dict[str, Any]]:
    """Load a file of `write_pt2`.

    Raises:
        CheckpointError: it is no such file.
    """
    extra = {METADATA: ""}
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        try:
            module = torch.export.load(path, extra_files=extra).module()
        except (*UNSUPPORTED, OSError) as error:
            raise CheckpointError(f"{path} is no file of torch.export ({reason(error)}).") from error
    return module, json.loads(extra[METADATA] or "{}")


def write_onnx(program: ExportedProgram, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write ONNX, opset 20.

    Raises:
        ConfigError: the model has an operator that ONNX has not.
    """
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["log_mel", "frames"],
                output_names=["logits"],
                dynamic_shapes={"log_mel": {0: "N"}, "frames": {0: "N"}},  # names of the axes alone
                verbose=False,
            )
        except UNSUPPORTED as error:
            raise ConfigError(f"ONNX cannot express this model: {reason(error)} Take the format pt2.") from error
    assert converted is not None
    converted.model.metadata_props["metadata"] = json.dumps(metadata)
    converted.save(path)


def read_onnx(path: Path) -> tuple[Run, dict[str, Any]]:
    """Load a file of `write_onnx` into ONNX Runtime, with as many threads as PyTorch has.

    Raises:
        ConfigError: onnxruntime is not installed.
        CheckpointError: it is no such file.
    """
    runtime = import_optional("onnxruntime", "running an ONNX file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common class but this
        raise CheckpointError(f"{path} is no ONNX file that ONNX Runtime reads ({reason(error)}).") from error

    def run(log_mel: Tensor, frames: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"log_mel": log_mel.numpy(), "frames": frames.numpy()})[0])

    properties = session.get_modelmeta().custom_metadata_map
    return run, json.loads(properties.get("metadata", "{}"))


def write_aoti(program: ExportedProgram, path: Path, metadata: Mapping[str, Any]) -> None:
    """Compile to machine code of this computer's processor, in a package that Python and C++ load.

    Raises:
        ConfigError: the compiler failed.
    """
    from torch._inductor import aoti_compile_and_package

    configs = {"aot_inductor.metadata": {"metadata": json.dumps(metadata)}}
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        try:
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
        except UNSUPPORTED as error:
            raise ConfigError(f"AOTInductor cannot compile this model: {reason(error)} Take the format pt2.") from error


def read_aoti(path: Path) -> tuple[Run, dict[str, Any]]:
    """Load a package of `write_aoti`, which runs its machine code: load only those that you trust.

    Raises:
        CheckpointError: it is no such package.
    """
    from torch._inductor import aoti_load_package

    try:
        package = aoti_load_package(str(path))
        metadata = package.loader.get_metadata()
    except UNSUPPORTED as error:
        raise CheckpointError(f"{path} is no package of AOTInductor ({reason(error)}).") from error
    return package, json.loads(metadata.get("metadata", "{}"))


def _check_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        import_optional(package, "the format onnx")


def _check_aoti() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        raise ConfigError(
            "the format aoti needs a C++ compiler: on Debian and Ubuntu, apt-get install g++; or name one with CXX=... "
            "The formats pt2 and onnx need none."
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' progress and notes off the terminal."""
    loggers = [
        logging.getLogger(name)
        for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export", "torch.utils.cpp_extension")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


FORMATS = {
    "pt2": Format(".pt2", write_pt2, read_pt2, lambda: None),
    "onnx": Format(".onnx", write_onnx, read_onnx, _check_onnx),
    "aoti": Format(".aoti.pt2", write_aoti, read_aoti, _check_aoti),
}
"""By name."""
