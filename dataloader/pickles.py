"""Safe reading of pickled tensors.

AVSBench's log-mels are files of `pickle.dump(tensor)`, and `pickle.load` on a file runs arbitrary code. Here the
opcodes are checked first: only those that a plain tensor needs are interpreted, and the functions named in torch's
pickles are replaced by functions of this file.
"""

import collections
import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import DataError

MAX_BYTES = 64 * 2**20
_ZIP_MAGIC = b"PK\x03\x04"
_TORCH_SAVE_MAGIC = 0x1950A86A20F9469CFC6C

# No BUILD, INST, OBJ, NEWOBJ, EXT or PERSID: they set attributes or make objects; tensors do not need them.
_OPCODES = frozenset(
    {
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "POP",
        "POP_MARK",
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "MEMOIZE",
        "PUT",
        "BINPUT",
        "LONG_BINPUT",
        "GET",
        "BINGET",
        "LONG_BINGET",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_DICT",
        "DICT",
        "EMPTY_LIST",
        "LIST",
    }
)


def read_tensor(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Tensor:
    """Read one tensor written by `pickle.dump` or `torch.save`, from any device, onto the CPU.

    Args:
        path: the file.
        max_bytes: largest file accepted.

    Returns:
        The tensor, without gradient.

    Raises:
        DataError: the file is missing, too large or damaged, does not hold a tensor, or contains opcodes or names
            that a tensor does not need; no code of the file is run.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise DataError(f"the pickle {path} has {size:,} bytes, more than {max_bytes:,}, the limit.")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"the pickle {path} is missing.") from error
    except OSError as error:
        raise DataError(f"the pickle {path} cannot be read ({error.strerror}).") from error
    try:
        value = _zip_load(data, max_bytes) if data.startswith(_ZIP_MAGIC) else _restricted_load(data)
    except _Refused as error:
        raise DataError(f"the pickle {path} is refused: it {error}, which a plain tensor does not need.") from error
    except Exception as error:  # a damaged stream can fail anywhere in the unpickler or in torch.load
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"the pickle {path} cannot be read as a tensor ({detail}).") from error
    if not isinstance(value, Tensor):
        raise DataError(f"the pickle {path} holds a {type(value).__name__}, expected a tensor.")
    return value.detach()


class _Refused(Exception):
    """The stream contains something that a tensor does not need."""


def _restricted_load(data: bytes) -> Any:
    try:
        names = [opcode.name for opcode, _, _ in pickletools.genops(data)]
    except Exception as error:
        raise ValueError(f"not a pickle: {error}") from error
    stranger = next((name for name in names if name not in _OPCODES), None)
    if stranger is not None:
        raise _Refused(f"uses the opcode {stranger}")
    value = _TensorUnpickler(io.BytesIO(data)).load()
    if type(value) is int and value == _TORCH_SAVE_MAGIC:  # torch.save before version 1.6
        return _torch_load(data)
    return value


def _zip_load(data: bytes, max_bytes: int) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > max_bytes:
            raise _Refused(f"unpacks to more than {max_bytes:,} bytes")
    return _torch_load(data)


def _torch_load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class _TensorUnpickler(pickle.Unpickler):
    """Resolves only the names in `_NAMES`."""

    def find_class(self, module: str, name: str) -> Any:
        known = _NAMES.get((module, name))
        if known is None:
            raise _Refused(f"names {module}.{name}")
        return known

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("uses a persistent id")


def _load_storage(data: bytes) -> Any:
    if not isinstance(data, bytes):
        raise _Refused("has a storage that is not bytes")
    storage = _torch_load(data)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise _Refused("stores something other than a storage")
    return storage


def _rebuild_tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *unused: Any
) -> Tensor:  # unused: requires_grad, hooks, metadata
    if not isinstance(storage, torch.storage.TypedStorage):
        raise _Refused("builds a tensor from something other than a storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
        raise _Refused("gives a tensor an impossible size")
    memory = storage._untyped_storage
    empty = torch.empty(0, dtype=storage.dtype)
    if 0 not in size:
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if last >= memory.nbytes() // empty.element_size():
            raise ValueError("the tensor reaches past its storage")
    return empty.set_(memory, offset, size, stride)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Bytes in pickle protocols before 3."""
    if encoding != "latin1" or not isinstance(text, str):
        raise _Refused("encodes text")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
}
