"""Dropout, with the compiled kernel and without it."""

import pytest
import torch

from model.layers import dropout as module
from model.layers.attention import MultiheadAttention
from model.layers.dropout import Dropout
from model.transformer import FeedForward
from ops.library import has_kernel


@pytest.fixture
def _kernel() -> None:
    if not has_kernel("cpu"):
        pytest.skip("no compiled kernel")


@pytest.fixture(params=["kernel", "PyTorch"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "PyTorch":
        monkeypatch.setattr(module, "has_kernel", lambda device: False)
    else:
        request.getfixturevalue("_kernel")


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("p", [0.1, 0.4, 0.75])
def test_drop_rate_and_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.full((401, 503), 2.0, requires_grad=True)  # not a multiple of a block
    out = Dropout(p)(x)
    dropped = (out == 0).double().mean()
    assert float(dropped) == pytest.approx(p, abs=5e-3)
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 2 / (1 - p)))
    out.sum().backward()
    assert torch.equal(x.grad == 0, out == 0)
    rows, columns = (out == 0).double().mean(1), (out == 0).double().mean(0)
    assert (
        float(rows.std()) < 1.3 * (p * (1 - p) / 503) ** 0.5 and float(columns.std()) < 1.3 * (p * (1 - p) / 401) ** 0.5
    )


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_masks_depend_on_the_seed_and_evaluation_has_none(dtype: torch.dtype) -> None:
    x, dropout = torch.randn(33).to(dtype), Dropout(0.5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(dropout(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert all(torch.equal(out, torch.where(out == 0, 0, 2 * x)) and out.dtype == dtype for out in outputs)
    assert dropout.eval()(x) is x
    assert torch.equal(Dropout(0.0)(x), x) and not Dropout(1.0)(x).any()


@pytest.mark.usefixtures("_kernel")
def test_the_mask_depends_on_seed_and_index_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def masks(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ops.modat.dropout(torch.ones(100_003, dtype=dtype), 0.3, seed) == 0

    expected = masks(7)
    assert torch.equal(masks(7, torch.bfloat16), expected)
    for capability in ("avx2", "portable"):
        monkeypatch.setenv("MODAT_CPU_CAPABILITY", capability)
        assert torch.equal(masks(7), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(masks(7), expected)
    finally:
        torch.set_num_threads(threads)
    # Neighbours, distant elements and other seeds are uncorrelated, within 4 standard errors.
    signs = expected.double() - 0.3
    for other in (
        signs.roll(1),
        signs.roll(16),
        signs.roll(32),
        masks(8).double() - 0.3,
        masks(7 << 32).double() - 0.3,
    ):
        assert abs(float((signs * other).mean() / 0.21)) < 4 / 100_003**0.5


@pytest.mark.usefixtures("_kernel")
def test_unsupported_arguments_of_the_kernel_are_named() -> None:
    with pytest.raises(ValueError, match=r"probability is in \[0, 1\), got 1"):
        torch.ops.modat.dropout(torch.ones(3), 1.0, 0)
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        torch.ops.modat.dropout(torch.ones(3).double(), 0.5, 0)
    torch.library.opcheck(torch.ops.modat.dropout, (torch.randn(7, 5), 0.5, 3))


@pytest.mark.usefixtures("_path")
def test_attention_with_dropout_has_the_mean_of_attention_without() -> None:
    torch.manual_seed(0)
    attention = MultiheadAttention(8, 2, dropout=0.3)
    query, memory = torch.randn(1, 1, 8).expand(4000, -1, -1), torch.randn(1, 5, 8).expand(4000, -1, -1)
    mask = torch.tensor([[True, True, False, True, True]]).expand(4000, -1)
    with torch.no_grad():
        mean = attention.train()(query, memory, mask).mean(dim=0)
        torch.testing.assert_close(mean, attention.eval()(query, memory, mask)[0], rtol=0.1, atol=0.03)


@pytest.mark.parametrize("module", [FeedForward(8, 16, 0.5), MultiheadAttention(8, 2, dropout=0.5)])
def test_recomputation_draws_the_same_mask(module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, 8)
    gradients, kept = [], []
    for _ in range(2):
        stored: list[int] = []

        def store(tensor: torch.Tensor, stored: list[int] = stored) -> torch.Tensor:
            stored.append(tensor.numel())
            return tensor

        torch.manual_seed(0)
        module.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
            out = module(x)
        out.square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
        kept.append(sum(stored))
        for name in ("transformer", "layers.attention"):
            monkeypatch.setattr(f"model.{name}.recompute", lambda function, *inputs, enable=True: function(*inputs))
    for recomputed, direct in zip(*gradients, strict=True):
        assert torch.equal(recomputed, direct) and direct.abs().sum() > 0
    assert kept[0] < kept[1]
