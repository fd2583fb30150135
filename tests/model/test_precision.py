"""Evaluation in bf16."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from model import build_model
from model.precision import round_weights
from tests.support import VARIANTS, example, tiny


@pytest.mark.parametrize("name", VARIANTS)
def test_rounded_weights_give_the_outputs_of_autocast_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(tiny(VARIANTS[name])).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(*example(3))
        round_weights(model, torch.bfloat16)
        found = model(*example(3))
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["audio_proj.weight"] == torch.bfloat16
    assert all(dtype == torch.float32 for name, dtype in dtypes.items() if "router" in name or "norm" in name)
