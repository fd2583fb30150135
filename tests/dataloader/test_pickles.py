"""Pickled tensors come out whatever wrote them; anything else in a pickle is refused before it runs."""

import builtins
import collections
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloader.pickles import read_tensor
from utils.errors import DataError

TENSOR = torch.arange(24, dtype=torch.float32).view(2, 3, 4)


def dump(path: Path, value: Any, protocol: int | None = None) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_tensor_comes_out_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    assert torch.equal(read_tensor(dump(tmp_path / "a.pkl", TENSOR, protocol)), TENSOR)


@pytest.mark.parametrize(
    "tensor",
    [
        TENSOR.half(),
        TENSOR.bfloat16(),
        TENSOR.double(),
        TENSOR.long(),
        TENSOR.transpose(0, 2),
        TENSOR[:, 1:],
        torch.zeros(0, 1, 96, 64),
        torch.tensor(3.0),
        TENSOR.clone().requires_grad_(),
    ],
)
def test_any_dtype_and_layout_comes_out_without_gradient(tmp_path: Path, tensor: torch.Tensor) -> None:
    read = read_tensor(dump(tmp_path / "a.pkl", tensor))
    assert read.dtype == tensor.dtype and torch.equal(read, tensor.detach()) and not read.requires_grad


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_of_torch_save_comes_out(tmp_path: Path, zipped: bool) -> None:
    torch.save(TENSOR, tmp_path / "a.pkl", _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_tensor(tmp_path / "a.pkl"), TENSOR)


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def storage_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.save(TENSOR.storage(), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_tensor_saved_on_a_gpu_comes_to_the_cpu(tmp_path: Path) -> None:
    on_gpu = storage_bytes().replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    assert on_gpu != storage_bytes()
    storage = Calls(torch.storage._load_from_bytes, on_gpu)
    rebuild = Calls(
        torch._utils._rebuild_tensor_v2, storage, 0, (2, 3, 4), (12, 4, 1), False, collections.OrderedDict()
    )
    read = read_tensor(dump(tmp_path / "a.pkl", rebuild))
    assert read.device.type == "cpu" and torch.equal(read, TENSOR)


def touch(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


def by_system(marker: Path) -> bytes:
    return pickle.dumps(Calls(os.system, f"touch '{marker}'"))


def by_exec_in_the_shape(marker: Path) -> bytes:
    storage = Calls(torch.storage._load_from_bytes, storage_bytes())
    return pickle.dumps(
        Calls(torch._utils._rebuild_tensor_v2, storage, 0, Calls(exec, touch(marker)), (1,), False, None)
    )


def by_nested_storage(marker: Path) -> bytes:
    inner = pickle.dumps(Calls(exec, touch(marker)), protocol=2)
    return pickle.dumps(Calls(torch.storage._load_from_bytes, inner))


def by_old_instance_opcode(marker: Path) -> bytes:
    return f"(S{touch(marker)!r}\nibuiltins\nexec\n.".encode()


def by_object_opcode(marker: Path) -> bytes:
    return b"(cbuiltins\nexec\nV" + touch(marker).encode() + b"\no."


def by_dotted_name(marker: Path) -> bytes:
    return b"\x80\x04\x8c\x0btorch._utils\x8c\x0bsys.modules\x93."


def by_setting_state(marker: Path) -> bytes:
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x01sb."


def by_torch_save(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Calls(exec, touch(marker)), buffer)
    return buffer.getvalue()


def by_old_torch_save(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Calls(exec, touch(marker)), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def by_import_of_a_package(marker: Path) -> bytes:
    return pickle.dumps(Calls(builtins.__import__, "antigravity"))


HOSTILE = [
    by_system,
    by_exec_in_the_shape,
    by_nested_storage,
    by_old_instance_opcode,
    by_object_opcode,
    by_dotted_name,
    by_setting_state,
    by_torch_save,
    by_old_torch_save,
    by_import_of_a_package,
]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("make", HOSTILE)
def test_a_hostile_pickle_is_refused_and_nothing_runs(tmp_path: Path, make: Callable[[Path], bytes]) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "a.pkl").write_bytes(make(marker))
    with pytest.raises(DataError, match=r"a\.pkl"):
        read_tensor(tmp_path / "a.pkl")
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("make", [by_system, by_exec_in_the_shape, by_old_instance_opcode, by_object_opcode])
def test_the_hostile_pickles_do_run_where_nothing_guards(tmp_path: Path, make: Callable[[Path], bytes]) -> None:
    """Otherwise the test above would prove nothing."""
    marker = tmp_path / "marker"
    try:
        pickle.loads(make(marker))
    except Exception as error:  # exec has run by then
        assert marker.exists(), error
    assert marker.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "uses the opcode APPENDS"),
        ({}, "holds a dict, expected a tensor"),
        (5, "holds a int, expected a tensor"),
        (os.path.join, r"names posixpath\.join"),
        (torch.nn.Linear(1, 1), "refused"),
    ],
)
def test_what_is_no_tensor_is_named(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_tensor(dump(tmp_path / "a.pkl", value))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("size", [(2, 3, 5), (10**9,), (-1,), (2.0, 3.0, 4.0)])
def test_a_tensor_cannot_reach_past_its_storage(tmp_path: Path, size: tuple[Any, ...]) -> None:
    storage = Calls(torch.storage._load_from_bytes, storage_bytes())
    stride = (1,) * len(size) if len(size) == 1 else (12, 4, 1)
    rebuild = Calls(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, None)
    with pytest.raises(DataError, match=r"a\.pkl"):
        read_tensor(dump(tmp_path / "a.pkl", rebuild))


def test_sizes_are_limited_before_reading(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="more than 100, the limit"):
        read_tensor(dump(tmp_path / "a.pkl", TENSOR), max_bytes=100)


def test_a_zip_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pkl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 5_000_000)
    with pytest.raises(DataError, match="unpacks to more than"):
        read_tensor(tmp_path / "a.pkl", max_bytes=1_000_000)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.pkl is missing"):
        read_tensor(tmp_path / "b.pkl")
    (tmp_path / "a.pkl").touch()
    with pytest.raises(DataError, match=r"a\.pkl cannot be read as a tensor"):
        read_tensor(tmp_path / "a.pkl")


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_data_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pkl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"any\.pkl"):
        read_tensor(path)


@settings(max_examples=200, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_pickle_gives_a_tensor_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(pickle.dumps(TENSOR))
    for position, value in changes:
        data[position % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    path.write_bytes(data)
    try:
        assert isinstance(read_tensor(path), torch.Tensor)
    except DataError as error:
        assert "damaged.pkl" in str(error)
