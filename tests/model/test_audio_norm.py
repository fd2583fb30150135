"""Normalisation of audio embeddings."""

import pytest
import torch

from model import build_model
from model.audio_norm import AudioNorm
from tests.support import example, tiny
from utils.errors import ConfigError


def embeddings(count: int = 400) -> torch.Tensor:
    """Positive embeddings with a large common part, every fourth of them silent."""
    torch.manual_seed(0)
    out = (3 + torch.randn(count, 8) * torch.linspace(0.1, 1, 8)).relu()
    out[::4] = 0
    return out


def test_standardised_sounds_have_mean_zero_and_deviation_one_whatever_the_pieces() -> None:
    x = embeddings()
    norm = AudioNorm("standardise", 8)
    assert norm.needs_statistics()
    norm.fit([x[:100], x[100:].view(10, 30, 8)])
    assert not norm.needs_statistics()
    out = norm(x)[(x != 0).any(1)]
    torch.testing.assert_close(out.mean(0), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(8), rtol=0, atol=1e-3)


@pytest.mark.parametrize("mode", ["standardise", "layer", "batch"])
def test_silence_becomes_its_own_embedding_and_takes_part_in_nothing(mode: str) -> None:
    x = embeddings()
    norm = AudioNorm(mode, 8).train()
    if mode == "standardise":
        norm.fit([x])
    out = norm(x)
    assert (out[::4] == norm.silence).all() and out.shape == x.shape
    sounding = x[(x != 0).any(1)]
    alone = AudioNorm(mode, 8).train()
    if mode == "standardise":
        alone.fit([sounding])
    torch.testing.assert_close(out[(x != 0).any(1)], alone(sounding), rtol=1e-5, atol=1e-5)


def test_tokens_are_normalised_one_by_one() -> None:
    x = embeddings().view(100, 4, 8)
    norm = AudioNorm("standardise", 8)
    norm.fit([x])
    torch.testing.assert_close(norm(x).flatten(0, 1), norm(x.flatten(0, 1)))


def test_a_dimension_that_never_varies_stays_finite() -> None:
    x = embeddings()
    x[:, 3] = torch.where((x != 0).any(1), 2.0, 0.0)
    norm = AudioNorm("standardise", 8)
    norm.fit([x])
    assert norm(x).isfinite().all() and norm(x)[1, 3].abs() < 1e-3


def test_statistics_travel_with_the_weights() -> None:
    norm, other = AudioNorm("standardise", 8), AudioNorm("standardise", 8)
    norm.fit([embeddings()])
    other.load_state_dict(norm.state_dict())
    assert not other.needs_statistics() and torch.equal(other(embeddings()), norm(embeddings()))


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.audio_norm='whiten' is not one of None, 'standardise'"):
        build_model({**tiny({}), "audio_norm": "whiten"})


@pytest.mark.parametrize("tokens", [1, 4])
def test_several_tokens_per_frame_reach_the_masks(tokens: int) -> None:
    torch.manual_seed(0)
    model = build_model({**tiny({"query_generator": {"query_init": "learned"}}), "audio_norm": "layer"}).eval()
    log_mel, frames = example(3)
    embedding = torch.rand(3, tokens, model.audio_encoder.audio_dim) + 0.1
    out = model(log_mel, frames, embedding=embedding)
    changed = embedding.clone()
    changed[1, -1] = torch.rand(model.audio_encoder.audio_dim)
    moved = (model(log_mel, frames, embedding=changed).logits - out.logits).abs().flatten(1).amax(1)
    assert moved[1] > 1e-6 and moved[0] == moved[2] == 0
