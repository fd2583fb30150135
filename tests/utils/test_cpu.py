"""The choice between float32 and bfloat16."""

from pathlib import Path

import pytest
import torch

from utils import cpu
from utils.cpu import ProductTimes, has_bf16_products, product_times, resolve_precision

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A CPU with the given product times in seconds and bf16 instructions or not."""

    def pretend(float32: float, bf16: float, native: bool = True) -> None:
        monkeypatch.setattr(cpu, "_warned", [])
        monkeypatch.setattr(cpu, "product_times", lambda: ProductTimes(float32, bf16))
        monkeypatch.setattr(cpu, "has_bf16_products", lambda: native)

    return pretend


@pytest.mark.parametrize(
    ("float32", "bf16", "native", "expected"),
    [
        (0.010, 0.005, True, "bf16"),
        (0.010, 0.009, True, "32"),  # not worth the rounding
        (0.010, 0.020, True, "32"),
        (0.010, 0.005, False, "32"),
    ],
)
def test_auto_takes_bf16_where_its_products_are_clearly_faster(machine, float32, bf16, native, expected) -> None:
    machine(float32, bf16, native)
    assert resolve_precision("auto", CPU) == expected


def test_auto_measures_nothing_on_a_cpu_without_bf16_instructions(machine, monkeypatch) -> None:
    machine(1.0, 0.1, native=False)
    monkeypatch.setattr(cpu, "product_times", lambda: pytest.fail("measured"))
    assert resolve_precision("auto", CPU) == "32"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "32")])
def test_auto_on_a_gpu_follows_what_the_gpu_computes_natively(monkeypatch, native: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert resolve_precision("auto", torch.device("cuda")) == expected
    assert resolve_precision("auto", torch.device("mps")) == "32"


def test_an_explicit_bf16_that_is_slower_gives_one_warning_with_both_figures(machine) -> None:
    machine(0.010, 0.0456)
    messages: list[str] = []
    for _ in range(2):
        assert resolve_precision("bf16", CPU, messages.append) == "bf16"
    assert len(messages) == 1 and "45.6 ms in bf16 and 10.0 ms in float32" in messages[0]
    assert "process.precision=32" in messages[0]


@pytest.mark.parametrize("precision", ["32", "16", "bf16"])
def test_other_precisions_and_a_faster_bf16_pass_without_a_word(machine, precision: str) -> None:
    machine(0.010, 0.005)
    assert resolve_precision(precision, CPU, pytest.fail) == precision
    assert resolve_precision(precision, torch.device("cuda"), pytest.fail) == precision


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 avx512_vnni\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("nothing\n", False),
    ],
)
def test_instructions_are_read_from_cpuinfo(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert has_bf16_products(tmp_path / "cpuinfo") is expected


def test_products_are_measured_in_both_precisions_once() -> None:
    times = product_times(0.0)
    assert times.float32 > 0 and times.bf16 > 0
    assert product_times(0.0) is times
