"""torch.compile: one graph without breaks, reused for the next batches."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from model import build_model
from tests.support import example, tiny


@pytest.mark.parametrize("training", [False, True])
def test_one_graph_without_breaks_for_all_batches(training: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    network = build_model(tiny({})).train(training)
    counter = CompileCounter()
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    log_mel, frames = example(3)
    flag = torch.ones(3)
    with torch.set_grad_enabled(training):
        for shift in range(3):
            out = compiled(log_mel + shift, frames + shift, flag)
            if not training:
                expected = network(log_mel + shift, frames + shift, flag)
                torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_labels_differ_from_batch_to_batch_without_new_graphs() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    network = build_model(tiny({})).train()
    counter = CompileCounter()
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    log_mel, frames = example(6)
    for rows in ([0, 3], [0, 1, 2], [1, 2, 4, 5], [0, 2, 3, 4, 5]):
        assert compiled(log_mel, frames, None, torch.tensor(rows)).logits.shape[0] == len(rows)
    assert counter.frame_count == 2  # one for the first number of frames, one for any
