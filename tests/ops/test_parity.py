"""Every backend against the definition and against what the published code computes."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ops
from tests.ops.conftest import CAPABILITIES
from tests.ops.support import BOUND, agree, draw, outcome, relative


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_matches_the_published_code(device, dtype, bound):
    with np.load(Path(__file__).parent / "reference_msda.npz") as file:
        stored = {name.removeprefix("msda_"): torch.from_numpy(file[name]) for name in file.files}
    shapes = stored["shapes"]
    tensors = [stored[name].to(device, dtype) for name in ("value", "loc", "weight")]
    got = outcome(ops.ms_deform_attn, shapes, tensors, stored["grad_out"], backend=device)
    true = [stored[name] for name in ("out", "grad_value", "grad_loc", "grad_weight")]
    assert max(relative(a, b) for a, b in zip(got, true, strict=True)) < bound


def test_definition_matches_the_published_code():
    with np.load(Path(__file__).parent / "reference_msda.npz") as file:
        stored = {name.removeprefix("msda_"): torch.from_numpy(file[name]) for name in file.files}
    tensors = [stored[name].double() for name in ("value", "loc", "weight")]
    got = outcome(ops.ms_deform_attn, stored["shapes"], tensors, stored["grad_out"], backend="torch")
    true = [stored[name] for name in ("out", "grad_value", "grad_loc", "grad_weight")]
    assert max(relative(a, b) for a, b in zip(got, true, strict=True)) < 1e-10


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("channels", [1, 7, 32, 64, 72])
def test_matches_the_definition(device, dtype, channels):
    shapes = ((7, 5), (4, 3), (1, 1))
    agree(draw(shapes, channels=channels, points=4, queries=9), shapes, dtype, device, BOUND[dtype])


@pytest.mark.usefixtures("cpu_kernel")
@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 4), st.integers(1, 40), st.integers(1, 19)),
    capability=st.sampled_from(CAPABILITIES),
    seed=st.integers(0, 2**16),
)
def test_any_shape(shapes, sizes, capability, seed):
    batch, queries, heads, channels, points = sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODAT_CPU_CAPABILITY", capability)
        agree(draw(shapes, batch, queries, heads, channels, points, seed), shapes, torch.float32, "cpu", 2e-5)
        agree(draw(shapes, batch, queries, heads, channels, points, seed), shapes, torch.float64, "cpu", 1e-11)


def test_strided_inputs_give_the_same_bits(device, kernel):
    shapes = ((6, 5), (3, 3))
    data = {name: tensor.float().to(device) for name, tensor in draw(shapes, heads=4, channels=32).items()}
    names = ("value", "reference", "offsets", "logits")
    dense = outcome(ops.ms_deform_attn_fused, shapes, [data[name] for name in names], data["grad"], backend=device)

    def widened(tensor: Tensor) -> Tensor:  # every second row of a larger tensor
        return torch.stack((tensor, tensor + 1), 1).flatten(0, 1)[::2]

    def turned(tensor: Tensor) -> Tensor:  # last axis no longer contiguous
        return tensor.transpose(1, -1).contiguous().transpose(1, -1)

    for change in (widened, turned):
        strided = [change(data[name]) for name in names]
        assert not any(tensor.is_contiguous() for tensor in strided)
        got = outcome(ops.ms_deform_attn_fused, shapes, strided, change(data["grad"]), backend=device)
        if kernel not in ("emulated", "cuda"):  # packs of fewer channels there, and atomics
            assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True))
        else:
            assert all(relative(a, b) < 1e-6 for a, b in zip(got, dense, strict=True))


@pytest.mark.parametrize("view", ["(Q, 2)", "(Q, levels, 2)", "(N, Q, levels, 2)"])
def test_reference_points_may_leave_out_axes(device, view):
    shapes = ((6, 5), (3, 3))
    data = {name: tensor.to(device) for name, tensor in draw(shapes).items()}
    reference = {
        "(Q, 2)": data["reference"][0, :, 0],
        "(Q, levels, 2)": data["reference"][0],
        "(N, Q, levels, 2)": data["reference"],
    }[view]
    tensors = [data["value"], reference, data["offsets"], data["logits"]]
    got = outcome(ops.ms_deform_attn_fused, shapes, tensors, data["grad"], backend=device)
    true = outcome(ops.ms_deform_attn_fused, shapes, tensors, data["grad"], backend="torch")
    assert max(relative(a, b) for a, b in zip(got, true, strict=True)) < 1e-10


@pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0)])
def test_empty_batch_or_queries(device, batch, queries):
    shapes = ((3, 4), (2, 2))
    data = draw(shapes, batch=batch, queries=queries)
    tensors = [data[name].to(device) for name in ("value", "reference", "offsets", "logits")]
    for backend in (device, "torch"):
        out, *grads = outcome(ops.ms_deform_attn_fused, shapes, tensors, data["grad"], backend=backend)
        assert out.shape == (batch, queries, 16)
        assert all(not grad.any() and grad.shape == tensor.shape for grad, tensor in zip(grads, tensors, strict=True))


def test_far_away_points_read_zeros_and_never_leave_the_memory(device):
    shapes = ((5, 4),)
    data = draw(shapes, queries=4, points=2)
    value = data["value"].float().to(device)
    locations = data["locations"].float().to(device)
    for far in (1e4, -1e4, 1e30, -1e30, float("inf"), -float("inf"), float("nan")):
        away = torch.full_like(locations, far)
        out, grad_value, grad_locations, grad_weights = outcome(
            ops.ms_deform_attn, shapes, [value, away, data["weights"].float().to(device)], data["grad"], backend=device
        )
        for tensor in (out, grad_value, grad_locations, grad_weights):
            assert torch.equal(tensor, torch.zeros_like(tensor)), far


@pytest.mark.parametrize("wanted", ["value", "reference", "offsets", "logits"])
def test_each_gradient_alone(device, wanted):
    shapes = ((5, 4), (2, 3))
    data = {name: tensor.to(device) for name, tensor in draw(shapes).items()}
    grads = []
    for backend in (device, "torch"):
        leaves = {name: data[name].detach() for name in ("value", "reference", "offsets", "logits")}
        leaves[wanted].requires_grad_()
        value, *rest = leaves.values()
        ops.ms_deform_attn_fused(value, shapes, *rest, backend=backend).backward(data["grad"])
        grads.append(leaves[wanted].grad)
    assert relative(*grads) < 1e-10


@pytest.mark.parametrize("queries", [1, 40])  # few of them leave value where it is
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_values_next_to_a_level_do_not_leak_into_it(device, queries, bad):
    shapes = ((3, 3), (4, 4), (2, 2))
    value = torch.randn(1, 29, 1, 32)
    value[:, :9] = bad
    value[:, -4:] = bad
    outside = torch.tensor([[-0.9, 0.5], [0.5, -0.9], [1.9, 0.5], [0.5, 1.9], [-0.1, -0.1], [1.1, 1.1]])
    inside = torch.tensor([[0.01, 0.3], [0.99, 0.4], [0.6, 0.02], [0.3, 0.99], [0.02, 0.01], [0.99, 0.98]])
    points = torch.stack([outside * 9, inside, outside * 9]).expand(1, queries, 1, 3, 6, 2)
    weights = torch.rand(1, queries, 1, 3, 6)
    got, true = (
        outcome(
            ops.ms_deform_attn,
            shapes,
            [tensor.to(device) for tensor in (value, points, weights)],
            torch.ones(1, queries, 32),
            backend=backend,
        )
        for backend in (device, "torch")
    )
    assert got[0].isfinite().all()
    assert max(relative(a, b) for a, b in zip(got, true, strict=True)) < 1e-5


@pytest.mark.parametrize("scale", [1e3, 80.0])
def test_softmax_of_large_logits(device, scale):
    shapes = ((5, 4), (2, 2))
    data = draw(shapes)
    data["logits"] = data["logits"] * scale
    data["logits"][0, 0, 0, 0, 0] = -float("inf")
    agree({**data, "weights": data["weights"]}, shapes, torch.float32, device, 2e-5)


def test_nan_logits_stay_visible(device):
    shapes = ((5, 4),)
    data = {name: tensor.float().to(device) for name, tensor in draw(shapes).items()}
    data["logits"][0, 0, 0, 0, 0] = float("nan")
    tensors = [data[name] for name in ("value", "reference", "offsets", "logits")]
    out = ops.ms_deform_attn_fused(tensors[0], shapes, *tensors[1:], backend=device)
    assert out[0, 0].isnan().sum() == 8  # the channels of one head
    assert out.isnan().sum() == 8


@pytest.mark.usefixtures("cpu_kernel")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_any_number_of_threads_gives_the_same_bits(capability, monkeypatch):
    monkeypatch.setenv("MODAT_CPU_CAPABILITY", capability)
    shapes = ((13, 11), (7, 6), (3, 3))
    data = draw(shapes, queries=200, heads=4, channels=32, points=4)
    tensors = [data[name].float() for name in ("value", "reference", "offsets", "logits")]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outcome(ops.ms_deform_attn_fused, shapes, tensors, data["grad"], backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for one, other in itertools.pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
