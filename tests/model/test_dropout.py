"""Our dropout is dropout."""

import pytest
import torch

from model.attention import MultiheadAttention
from model.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.4, 0.75])
def test_it_drops_the_right_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.full((401, 503), 2.0, requires_grad=True)  # no multiple of four
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


def test_it_follows_the_seed_and_is_off_in_evaluation() -> None:
    x, dropout = torch.randn(33), Dropout(0.5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(dropout(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert dropout.eval()(x) is x
    assert torch.equal(Dropout(0.0)(x), x) and not Dropout(1.0)(x).any()


def test_attention_with_dropout_has_the_mean_of_attention_without() -> None:
    torch.manual_seed(0)
    attention = MultiheadAttention(8, 2, dropout=0.3)
    query, memory = torch.randn(1, 1, 8).expand(4000, -1, -1), torch.randn(1, 5, 8).expand(4000, -1, -1)
    mask = torch.tensor([[True, True, False, True, True]]).expand(4000, -1)
    with torch.no_grad():
        mean = attention.train()(query, memory, mask).mean(dim=0)
        torch.testing.assert_close(mean, attention.eval()(query, memory, mask)[0], rtol=0.1, atol=0.03)
