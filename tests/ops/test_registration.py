"""The operators as PyTorch citizens: gradcheck, opcheck, compile, export, autocast, and what they refuse."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import ops
from ops.library import has_kernel
from ops.module import MSDeformAttn

SHAPES = ((4, 3), (2, 2))
FLAT = [4, 3, 2, 2]


@pytest.fixture(autouse=True, params=["cpu", pytest.param("emulated", marks=pytest.mark.process)])
def _kernel(request: pytest.FixtureRequest, cpu_kernel: None) -> Iterator[None]:
    """The CPU kernels, and the CUDA kernels emulated on the CPU."""
    if request.param == "cpu":
        yield
    else:
        with request.getfixturevalue("emulation").active():
            yield


def inputs(dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(2, 16, 2, 5, generator=generator, dtype=dtype)
    # Off pixel centres, where the derivative jumps: gradcheck's step must stay on one side.
    locations = torch.rand(2, 3, 2, 2, 2, 2, generator=generator, dtype=dtype) * 0.1 + 0.3
    reference = torch.full((2, 3, 2, 2), 0.4, dtype=dtype)
    offsets = torch.rand(2, 3, 2, 2, 2, 2, generator=generator, dtype=dtype) * 0.25 + 0.05
    logits = torch.randn(2, 3, 2, 2, 2, generator=generator, dtype=dtype)
    return [tensor.requires_grad_(grad) for tensor in (value, locations, reference, offsets, logits)]


def test_gradcheck():
    value, locations, reference, offsets, logits = inputs()
    plain = torch.ops.modat.ms_deform_attn
    fused = torch.ops.modat.ms_deform_attn_fused
    assert torch.autograd.gradcheck(lambda v, p, w: plain(v, FLAT, p, w), (value, locations, logits))
    assert torch.autograd.gradcheck(lambda v, r, o, w: fused(v, FLAT, r, o, w), (value, reference, offsets, logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    value, locations, reference, offsets, logits = inputs(dtype)
    grad = torch.randn(2, 3, 10, dtype=dtype)
    torch.library.opcheck(torch.ops.modat.ms_deform_attn, (value, FLAT, locations, logits))
    torch.library.opcheck(torch.ops.modat.ms_deform_attn_fused, (value, FLAT, reference, offsets, logits))
    plain = tuple(tensor.detach() for tensor in (value, locations, logits))
    torch.library.opcheck(torch.ops.modat.ms_deform_attn_backward, (grad, plain[0], FLAT, *plain[1:]))
    fused = tuple(tensor.detach() for tensor in (value, reference, offsets, logits))
    torch.library.opcheck(torch.ops.modat.ms_deform_attn_fused_backward, (grad, fused[0], FLAT, *fused[1:]))


def layer_and_inputs():
    torch.manual_seed(0)
    layer = MSDeformAttn(embed_dim=32, num_levels=2, num_heads=4, num_points=3)
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.1)
    return layer, torch.randn(2, 5, 32), torch.rand(5, 2), torch.randn(2, 16, 32)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiles_without_a_graph_break(backend):
    layer, query, reference, memory = layer_and_inputs()
    layer.backend = backend
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for call in (layer, compiled):
        layer.zero_grad()
        out = call(query, reference, memory, SHAPES)
        out.square().sum().backward()
        results.append([out.detach(), *(parameter.grad.clone() for parameter in layer.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def test_compiles_once_for_all_batch_sizes():
    layer, _, reference, memory = layer_and_inputs()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    # Dynamo takes equal sizes of the first call for one symbol: its batch must not be the 2 of x and y.
    for batch in (6, 3, 7):
        query = torch.randn(batch, 5, 32)
        out = compiled(query, reference, memory[:1].expand(batch, -1, -1), SHAPES)
        assert torch.allclose(out, layer(query, reference, memory[:1].expand(batch, -1, -1), SHAPES), atol=1e-6)
    assert counter.frame_count == 1


def test_exports():
    layer, query, reference, memory = layer_and_inputs()
    program = torch.export.export(layer, (query, reference, memory, SHAPES))
    names = {str(node.target) for node in program.graph.nodes}
    assert "modat.ms_deform_attn_fused.default" in names
    assert torch.equal(program.module()(query, reference, memory, SHAPES), layer(query, reference, memory, SHAPES))


def test_vmap_is_refused_in_words():
    value, locations, *_, logits = inputs(grad=False)
    with pytest.raises(NotImplementedError, match=r"fold the mapped axis into N; or use backend='torch'"):
        torch.vmap(lambda v, p, w: ops.ms_deform_attn(v, SHAPES, p, w))(value[None], locations[None], logits[None])


def test_second_derivative_is_refused_in_words():
    value, locations, *_, logits = inputs()
    out = ops.ms_deform_attn(value, SHAPES, locations, logits)
    (grad,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative; use backend='torch'"):
        grad.sum().backward()


def test_only_the_inputs_are_kept_for_backward():
    value, _, reference, offsets, logits = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        torch.ops.modat.ms_deform_attn_fused(value, FLAT, reference, offsets, logits)
    assert {tensor.data_ptr() for tensor in kept} == {t.data_ptr() for t in (value, reference, offsets, logits)}


def test_autocast_takes_low_precision_values_and_float32_coordinates(monkeypatch):
    layer, query, reference, memory = layer_and_inputs()
    seen = {}
    original = torch.ops.modat.ms_deform_attn_fused

    def spy(value, shapes, points, offsets, logits):
        seen.update(value=value.dtype, points=points.dtype, offsets=offsets.dtype, logits=logits.dtype)
        return original(value, shapes, points, offsets, logits)

    monkeypatch.setattr(torch.ops.modat, "ms_deform_attn_fused", spy)
    exact = layer(query, reference, memory, SHAPES)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(query, reference, memory, SHAPES)
    assert seen == {"value": torch.bfloat16, "points": torch.float32, "offsets": torch.float32, "logits": torch.float32}
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() / exact.norm() < 0.02


def test_layer_starts_as_published():
    layer = MSDeformAttn(embed_dim=256, num_levels=3, num_heads=8, num_points=4)
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "sampling_offsets.weight": (192, 256),
        "sampling_offsets.bias": (192,),
        "attention_weights.weight": (96, 256),
        "attention_weights.bias": (96,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }
    bias = layer.sampling_offsets.bias.view(8, 3, 4, 2)
    assert torch.allclose(bias[0, 0, :, 0], torch.tensor([1.0, 2.0, 3.0, 4.0]))  # head 0 looks right, a pixel a point
    assert torch.allclose(bias[1, 2, 3], torch.tensor([4.0, 4.0]))  # head 1 along the diagonal
    assert not layer.attention_weights.bias.any()
    assert not layer.sampling_offsets.weight.any()
    assert layer.value_proj.weight.std() > 0.01


BAD = {
    "five rows": (dict(value=torch.zeros(2, 5, 2, 5)), ValueError, r"L = 5 rows.*add up to 16"),
    "three axes": (dict(value=torch.zeros(2, 16, 10)), ValueError, r"\(2, 16, 10\)"),
    "integer": (dict(value=torch.zeros(2, 16, 2, 5, dtype=torch.int64)), TypeError, "torch.int64"),
    "heads": (dict(points=torch.zeros(2, 3, 4, 2, 2, 2)), ValueError, r"M = 2 of value.*\(2, 3, 4, 2, 2, 2\)"),
    "batch": (dict(points=torch.zeros(1, 3, 2, 2, 2, 2)), ValueError, "N = 2, M = 2 of value"),
    "weights": (dict(weights=torch.zeros(2, 3, 2, 2, 3)), ValueError, r"\(2, 3, 2, 2, 2\) of sampling_locations"),
    "dtype": (dict(weights=torch.zeros(2, 3, 2, 2, 2).double()), TypeError, "torch.float64, value torch.float32"),
    "device": (dict(points=torch.zeros(2, 3, 2, 2, 2, 2, device="meta")), ValueError, "on meta, value on cpu"),
    "level of no size": (dict(shapes=((4, 4), (0, 2))), ValueError, "at least 1 x 1"),
    "no level": (dict(shapes=()), ValueError, "at least one level"),
    "flat shapes": (dict(shapes=(4, 3, 2, 2)), ValueError, "pairs"),
    "backend": (dict(backend="gpu"), ValueError, "auto, cpu, cuda or torch, got 'gpu'"),
    "other device's backend": (dict(backend="cuda"), RuntimeError, "cannot take tensors on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named_with_their_numbers(case):
    change, error, message = BAD[case]
    good = dict(
        value=torch.zeros(2, 16, 2, 5),
        shapes=SHAPES,
        points=torch.zeros(2, 3, 2, 2, 2, 2),
        weights=torch.zeros(2, 3, 2, 2, 2),
        backend="auto",
    )
    call = {**good, **change}
    with pytest.raises(error, match=message):
        ops.ms_deform_attn(call["value"], call["shapes"], call["points"], call["weights"], call["backend"])


def test_reference_points_of_a_wrong_shape_are_named():
    value, _, _, offsets, logits = inputs(grad=False)
    with pytest.raises(ValueError, match=r"one of the shapes \(3, 2\), \(3, 2, 2\), \(2, 3, 2, 2\), got \(4, 2\)"):
        ops.ms_deform_attn_fused(value, SHAPES, torch.zeros(4, 2, dtype=torch.float64), offsets, logits)


def test_embed_dim_must_hold_the_heads():
    with pytest.raises(ValueError, match="embed_dim 30 is not a multiple of num_heads 8"):
        MSDeformAttn(embed_dim=30)


def test_the_raw_operator_checks_its_memory():
    value, locations, *_, logits = inputs(grad=False)
    with pytest.raises(ValueError, match="do not add up"):
        torch.ops.modat.ms_deform_attn(value, [4, 4, 2, 2], locations, logits)
    with pytest.raises(ValueError, match="do not fit"):
        torch.ops.modat.ms_deform_attn(value, FLAT, locations[:1], logits)
    with pytest.raises(TypeError, match="must be Double"):
        torch.ops.modat.ms_deform_attn(value, FLAT, locations.float(), logits)


def test_kernel_is_there_by_its_name():
    assert has_kernel("cpu")
    assert torch.ops.modat.cpu_capability() in ("avx512", "avx2", "portable")
