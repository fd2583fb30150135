"""The CUDA kernels: emulated on a CPU (tests/ops/emulation), and on a GPU if there is one. See also test_parity.py."""

import contextlib
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.support import (
    BOUND,
    FORMS,
    agree,
    among_nan,
    deterministic,
    draw,
    errors,
    frames_apart,
    outcome,
    relative,
)

LEVELS = ((7, 5), (4, 3), (2, 2))
SOURCES = Path(__file__).parents[2] / "ops" / "src"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_compiles_the_kernels(tmp_path):
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("75", "90")]
    command = ["nvcc", "-std=c++17", "-O1", *targets, "-gencode=arch=compute_90,code=compute_90", "--threads=0"]
    result = subprocess.run(
        [*command, "-c", str(SOURCES / "cuda_kernels.cu"), "-o", str(tmp_path / "kernels.o")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "error" not in result.stderr


def leaves(data: dict[str, Tensor], form: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Inputs of a form: value in `dtype`, the others in float32 (float64 for float64)."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    names = ("value", *FORMS[form][2])
    return [data[name].to(device, dtype if name == "value" else work) for name in names]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    ("heads", "channels"), [(3, 2), (2, 5), (2, 6), (1, 12), (8, 24), (2, 40), (1, 96), (1, 136), (1, 264), (1, 300)]
)
def test_head_widths(gpu, dtype, heads, channels):
    agree(draw(LEVELS, heads=heads, channels=channels, queries=5), LEVELS, dtype, gpu, BOUND[dtype])


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        (tuple((1 + i % 3, 1 + i % 4) for i in range(16)), dict(channels=16, points=3)),
        (((3, 9),), dict(channels=32, points=37)),  # more samples than a warp has lanes
        (((1, 1), (1, 7), (7, 1)), dict(queries=1, heads=1, points=1)),
        (((7, 5), (4, 3)), dict(batch=5, queries=70, heads=1, channels=1, points=1)),
        (((2, 2),), dict(batch=1, queries=33, heads=5, channels=32, points=3)),  # one query more than a block takes
    ],
    ids=("16 levels", "37 points", "rows of pixels", "one channel", "33 queries"),
)
def test_sizes(gpu, dtype, shapes, sizes):
    agree(draw(shapes, **sizes), shapes, dtype, gpu, BOUND[dtype])


def offset_by_one(tensor: Tensor) -> Tensor:
    """Starts at the second element of its storage: no pack is aligned."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)


def part_of_wider_rows(tensor: Tensor) -> Tensor:
    """`wide[..., :D]` of a tensor of NaN with 4 channels more."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 4), float("nan"))
    return wide[..., : tensor.shape[-1]].copy_(tensor) if tensor.dim() == 4 else tensor


def heads_first(tensor: Tensor) -> Tensor:
    """Memory order (N, M, L, D) for value."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() == 4 else tensor


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("change", [offset_by_one, frames_apart, part_of_wider_rows, heads_first, among_nan])
def test_strides_and_alignments(gpu, dtype, change):
    agree(draw(LEVELS, heads=4, channels=32, points=4, queries=9), LEVELS, dtype, gpu, BOUND[dtype], change)


@pytest.mark.parametrize("form", FORMS)
def test_strides_beyond_32_bits(gpu, form):
    if gpu == "cuda" and torch.cuda.get_device_properties(0).total_memory < 2**34:
        pytest.skip("takes 12 GB of GPU memory")
    shapes = ((5, 4), (2, 2))
    data = draw(shapes, heads=2, channels=16)
    frame = (1 << 31) + 16
    row = (1 << 30) // 24 // 8 * 8
    storage = torch.empty(frame + 16 + 24 * row, dtype=torch.bfloat16, device=gpu)  # on a CPU: reserved, not touched
    inputs = leaves(data, form, torch.bfloat16, gpu)
    inputs[0] = storage.as_strided((2, 24, 2, 16), (frame, row, 16, 1)).copy_(inputs[0])
    kernel, definition, _ = FORMS[form]
    got = kernel(inputs[0], shapes, *inputs[1:], backend=gpu)
    true = definition(inputs[0].contiguous().double(), shapes, *(tensor.double() for tensor in inputs[1:]))
    assert relative(got, true) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0), (0, 0)])
def test_empty_batch_or_queries(gpu, batch, queries, form, ordered):
    data = draw(LEVELS, batch=batch, queries=queries)
    with deterministic() if ordered else contextlib.nullcontext():
        inputs = leaves(data, form, torch.float32, gpu)
        out, *grads = outcome(FORMS[form][0], LEVELS, inputs, data["grad"], backend=gpu)
    assert out.shape == (batch, queries, 16)
    assert all(not grad.any() and grad.shape == tensor.shape for grad, tensor in zip(grads, inputs, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_samples_far_outside_add_nothing(gpu, form):
    data = draw(LEVELS, channels=32)
    for far in (1e4, -1e4, 1e30, -3e38, float("inf"), -float("inf"), float("nan")):
        inputs = leaves(data, form, torch.float32, gpu)
        inputs[-2].fill_(far)
        for mode in (contextlib.nullcontext(), deterministic()):
            with mode:
                got = outcome(FORMS[form][0], LEVELS, inputs, data["grad"], backend=gpu)
            assert not any(tensor.any() for tensor in got), far


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_samples_on_pixel_centres_and_borders(gpu, dtype, form):
    steps = torch.arange(-4, 13, dtype=torch.float64) / 2
    grid = torch.cartesian_prod(steps, steps)
    shapes = ((4, 4), (4, 4))
    data = draw(shapes, batch=1, queries=2, points=len(grid))
    pixels = grid.expand(1, 2, 2, 2, -1, 2)
    data["locations"] = (pixels + 0.5) / 4
    data["reference"] = torch.full((1, 2, 2, 2), 0.5, dtype=torch.float64)
    data["offsets"] = pixels + 0.5 - 2
    found = errors(data, shapes, dtype, gpu, form)
    smooth = {"out", "value", "weights", "logits"}  # the gradient of a location jumps at a pixel centre
    assert max(error for name, error in found.items() if name in smooth) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_nan_and_infinite_values_come_out_where_the_definition_has_them(gpu, dtype, form):
    data = draw(LEVELS, queries=40, channels=16)
    data["value"][0, 3, 0, 1] = float("nan")
    data["value"][0, 34, 0, 2] = float("inf")  # a corner of the first level
    data["value"][1, 40, 1, 5] = float("inf")
    data["value"][1, -1, 1, 15] = -float("inf")
    inputs = leaves(data, form, dtype, gpu)
    got = FORMS[form][0](inputs[0], LEVELS, *inputs[1:], backend=gpu)
    true = FORMS[form][1](inputs[0].double(), LEVELS, *(tensor.double() for tensor in inputs[1:]))
    assert not true.isfinite().all()
    assert relative(got, true) < BOUND[dtype]


def test_logits_without_a_finite_softmax(gpu):
    data = draw(LEVELS, queries=8)
    data["offsets"] = data["offsets"] * 0
    data["logits"][0, 1, 1, 1, 2] = float("nan")
    data["logits"][0, 2, 1, 1, 2] = float("inf")
    data["logits"][0, 3, 0] = -float("inf")
    inputs = leaves(data, "fused", torch.float32, gpu)
    got = FORMS["fused"][0](inputs[0], LEVELS, *inputs[1:], backend=gpu)
    true = FORMS["fused"][1](inputs[0].double(), LEVELS, *(tensor.double() for tensor in inputs[1:]))
    assert true[0, 1:4].isnan().any(-1).all()
    assert relative(got, true) < BOUND[torch.float32]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 4), st.integers(1, 40), st.integers(1, 19)),
    dtype=st.sampled_from(list(BOUND)),
    ordered=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(gpu, shapes, sizes, dtype, ordered, seed):
    batch, queries, heads, channels, points = sizes
    with deterministic() if ordered else contextlib.nullcontext():
        agree(draw(shapes, batch, queries, heads, channels, points, seed), shapes, dtype, gpu, BOUND[dtype] * 10)


def orders(kernel: str, request: pytest.FixtureRequest) -> list[AbstractContextManager[None]]:
    """In the emulation, three orders of threads and blocks; a GPU has its own."""
    if kernel == "cuda":
        return [contextlib.nullcontext() for _ in range(3)]
    emulation = request.getfixturevalue("emulation")
    return [emulation.order(seed) for seed in (0, 3, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_order_of_threads_gives_the_same_result(gpu, gpu_kernel, dtype, request):
    for order in orders(gpu_kernel, request):
        with order:
            agree(draw(LEVELS, queries=19, heads=3, channels=24), LEVELS, dtype, gpu, BOUND[dtype])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [dict(queries=9, channels=32), dict(batch=1, queries=37, heads=1, channels=7), dict(heads=1, channels=300)],
    ids=("32 channels", "7 channels", "300 channels"),
)
def test_deterministic_backward_repeats_its_bits_in_any_order_of_threads(gpu, gpu_kernel, sizes, dtype, form, request):
    data = draw(LEVELS, **sizes)
    results = []
    with deterministic():
        assert max(errors(data, LEVELS, dtype, gpu, form).values()) < BOUND[dtype]
        for order in orders(gpu_kernel, request):
            with order:
                inputs = leaves(data, form, dtype, gpu)
                results.append(outcome(FORMS[form][0], LEVELS, inputs, data["grad"], backend=gpu))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck(gpu):
    data = draw(LEVELS, batch=1, queries=2, channels=3, points=2)
    for form, flat in (("plain", torch.ops.modat.ms_deform_attn), ("fused", torch.ops.modat.ms_deform_attn_fused)):
        inputs = [tensor.requires_grad_() for tensor in leaves(data, form, torch.float64, gpu)]
        sizes = [size for shape in LEVELS for size in shape]
        assert torch.autograd.gradcheck(lambda v, *r, op=flat, sizes=sizes: op(v, sizes, *r), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(gpu, dtype):
    data = draw(LEVELS)
    sizes = [size for shape in LEVELS for size in shape]
    for form, name in (("plain", "ms_deform_attn"), ("fused", "ms_deform_attn_fused")):
        inputs = leaves(data, form, dtype, gpu)
        grad = data["grad"].to(gpu, dtype)
        differentiable = [tensor.clone().requires_grad_() for tensor in inputs]
        torch.library.opcheck(getattr(torch.ops.modat, name), (differentiable[0], sizes, *differentiable[1:]))
        torch.library.opcheck(getattr(torch.ops.modat, f"{name}_backward"), (grad, inputs[0], sizes, *inputs[1:]))


def test_more_levels_than_the_kernels_take_are_refused_in_words(gpu):
    shapes = ((1, 1),) * 17
    inputs = leaves(draw(shapes), "plain", torch.float32, gpu)
    with pytest.raises(ValueError, match="up to 16 levels, got 17; use backend='torch'"):
        FORMS["plain"][0](inputs[0], shapes, *inputs[1:], backend=gpu)


def _fused_on(device: str) -> tuple[list[Tensor], Tensor]:
    """Inputs on a device, and the definition's result."""
    data = draw(LEVELS, channels=32)
    inputs = leaves(data, "fused", torch.float32, "cpu")
    return [tensor.to(device) for tensor in inputs], FORMS["fused"][1](inputs[0], LEVELS, *inputs[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_runs_on_the_current_stream():
    inputs, true = _fused_on("cuda")
    for tensor in inputs:
        tensor.fill_(float("nan"))  # before the copy on the side stream
    source, _ = _fused_on("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for tensor, numbers in zip(inputs, source, strict=True):
            tensor.copy_(numbers)
        got = FORMS["fused"][0](inputs[0], LEVELS, *inputs[1:], backend="cuda")
    side.synchronize()
    assert relative(got, true) < BOUND[torch.float32]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
def test_runs_on_a_second_device():
    inputs, true = _fused_on("cuda:1")
    got = FORMS["fused"][0](inputs[0], LEVELS, *inputs[1:], backend="cuda")
    assert got.device == torch.device("cuda:1")
    assert relative(got, true) < BOUND[torch.float32]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_can_be_captured_in_a_cuda_graph():
    inputs, true = _fused_on("cuda")
    differentiable = [tensor.requires_grad_() for tensor in inputs]

    def step() -> tuple[Tensor, ...]:
        out = FORMS["fused"][0](differentiable[0], LEVELS, *differentiable[1:], backend="cuda")
        return out, *torch.autograd.grad(out.sum(), differentiable)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert relative(captured[0], true) < BOUND[torch.float32]
    assert all(relative(a, b) < BOUND[torch.float32] for a, b in zip(captured, eager, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    chosen = "test_head_widths and cuda and float32 or test_deterministic and cuda and bfloat16"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
    result = subprocess.run([*command, __file__, "-k", chosen], capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:]
