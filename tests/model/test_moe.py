"""The router against a token-by-token reference, and properties that hold for any gates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from model.moe import ChannelExperts, MixtureOfExperts, SecondChoice, SpatialExperts, Top2Router, counter_uniform


def make_router(channels: int, experts: int, policy: str, factor: float, threshold: float = 0.2) -> Top2Router:
    """A router in evaluation mode."""
    choice = SecondChoice(policy, threshold, factor)
    return Top2Router(channels, experts, train=choice, evaluation=choice).eval()


def route_token_by_token(router: Top2Router, tokens: torch.Tensor) -> torch.Tensor:
    """Weights (n, E) of one frame's tokens (n, C), filling the experts' slots one token at a time."""
    choice = router.evaluation_choice
    n, experts = tokens.shape[0], router.weight.shape[1]
    capacity = max(4, min(n, int(n * choice.capacity_factor / experts)))
    gates = (tokens @ router.weight).softmax(-1)
    draws = counter_uniform(n, router.seed, tokens.device)
    weights, used = torch.zeros(n, experts), [0] * experts
    choices = []
    for token in range(n):
        first = int(gates[token].argmax())
        rest = gates[token].clone()
        rest[first] = 0
        second = int(rest.argmax())
        total = gates[token, first] + rest[second] + 1e-9
        choices.append((first, second, gates[token, first] / total, rest[second] / total))
    for token, (first, _, share, _) in enumerate(choices):
        if used[first] < capacity:
            used[first] += 1
            weights[token, first] += share
    for token, (_, second, _, share) in enumerate(choices):
        keep = {
            "all": True,
            "none": False,
            "threshold": bool(share > choice.threshold),
            "random": bool(draws[token] < share / choice.threshold),
        }[choice.policy]
        if keep and used[second] < capacity:
            used[second] += 1
            weights[token, second] += share
    return weights


routers = st.tuples(
    st.integers(1, 3),  # frames
    st.integers(1, 40),  # tokens
    st.integers(1, 7),  # experts
    st.sampled_from(["all", "none", "threshold", "random"]),
    st.floats(0.1, 3.0),  # capacity factor
    st.sampled_from([0.0, 1.0, 30.0]),  # scale of the router's logits
    st.integers(0, 2**20),
)


@settings(max_examples=60, deadline=None)
@given(routers)
def test_routing_is_the_definition_for_any_gates(case: tuple[int, int, int, str, float, float, int]) -> None:
    frames, n, experts, policy, factor, sharpness, seed = case
    torch.manual_seed(seed)
    router = make_router(5, experts, policy, factor)
    tokens = torch.randn(frames, n, 5) * sharpness
    with torch.no_grad():
        routing = router(tokens)
        expected = torch.stack([route_token_by_token(router, frame) for frame in tokens])
        alone = torch.cat([router(frame[None]).weight for frame in tokens])
    torch.testing.assert_close(routing.weight, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.weight, alone, rtol=1e-5, atol=1e-6)
    assert int(routing.kept.sum(dim=1).max()) <= routing.capacity
    assert int(routing.kept.sum(dim=2).max()) <= 2
    assert float(routing.weight.sum(dim=2).max()) <= 1 + 1e-5
    assert torch.isfinite(routing.balance)


def test_weights_of_a_token_sum_to_one_without_a_capacity_limit() -> None:
    torch.manual_seed(1)
    routing = make_router(8, 4, "all", 100.0)(torch.randn(2, 30, 8))
    torch.testing.assert_close(routing.weight.sum(dim=2), torch.ones(2, 30), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [ChannelExperts, SpatialExperts])
def test_experts_without_tokens_have_finite_gradients(kind: type) -> None:
    torch.manual_seed(0)
    mixture = MixtureOfExperts(make_router(16, 4, "all", 2.0), kind(16, 4, num_heads=2))
    for parameter in mixture.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.zeros(2, 12, 16, requires_grad=True)  # equal gates: expert 3 gets no token
    output, balance = mixture(tokens, torch.randn(2, 3, 16))
    (output.sum() + balance).backward()
    assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in mixture.parameters())


def test_all_audio_tokens_equal_one_where_they_are_the_same() -> None:
    torch.manual_seed(0)
    experts = SpatialExperts(16, 4, num_heads=2, audio_tokens="all").eval()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens, audio = torch.randn(2, 9, 16), torch.randn(2, 1, 16)
    routing = make_router(16, 4, "all", 2.0)(tokens)
    several = experts(tokens, audio.expand(-1, 3, -1), routing)
    experts.audio_tokens = "mean"
    torch.testing.assert_close(several, experts(tokens, audio, routing), rtol=1e-4, atol=1e-5)


def test_dropout_keeps_the_mean_of_the_spatial_experts() -> None:
    torch.manual_seed(0)
    experts = SpatialExperts(8, 2, num_heads=2, dropout=0.4)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens, audio = torch.randn(1, 4000, 8), torch.randn(1, 1, 8)
    routing = make_router(8, 2, "all", 4.0)(tokens)
    mean = experts.train()(tokens, audio, routing).mean(dim=1)
    torch.testing.assert_close(mean, experts.eval()(tokens, audio, routing).mean(dim=1), rtol=0.1, atol=0.02)


def test_counter_draws_are_uniform_and_depend_on_the_seed() -> None:
    draws = counter_uniform(100_000, 3, torch.device("cpu"))
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    histogram = torch.histc(draws, 50, 0, 1)
    assert float(((histogram - 2000) ** 2 / 2000).sum()) < 90  # chi-square, 49 degrees: 1 in 5000
    assert float(torch.corrcoef(torch.stack([draws[1:], draws[:-1]]))[0, 1].abs()) < 0.02
    other = counter_uniform(100_000, 4, torch.device("cpu"))
    assert float(torch.corrcoef(torch.stack([draws, other]))[0, 1].abs()) < 0.02


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run the operation and record its outputs' sizes."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("kind", [ChannelExperts, SpatialExperts])
def test_no_tensor_has_a_capacity_axis(kind: type) -> None:
    torch.manual_seed(0)
    mixture = MixtureOfExperts(make_router(16, 4, "all", 2.0), kind(16, 4, num_heads=2)).eval()
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for n in (256, 1024):
        with LargestTensor() as seen, torch.no_grad():
            mixture(torch.randn(1, n, 16), torch.randn(1, 3, 16))
        assert seen.elements <= n * 16  # tokens, or E * heads scores each; dense dispatch has n * E * capacity
