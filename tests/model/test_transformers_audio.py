"""Audio encoders of transformers: tiny random models, written to a folder and read by its name."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dataloader.front_ends import front_end
from model import build_model
from model.pretrained import load_pretrained
from model.transformers_audio import TransformersAudio
from tests.support import tiny
from utils.errors import ConfigError

transformers = pytest.importorskip("transformers", reason="the optional extra transformers is not installed")


@pytest.fixture
def ast(tmp_path: Path) -> str:
    config = transformers.ASTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_length=96,
        num_mel_bins=32,
    )
    transformers.ASTModel(config).save_pretrained(tmp_path / "ast")
    transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=96).save_pretrained(tmp_path / "ast")
    return str(tmp_path / "ast")


@pytest.fixture
def clap(tmp_path: Path) -> str:
    audio = transformers.ClapAudioConfig(
        patch_embeds_hidden_size=16,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        hidden_size=32,
        window_size=4,
        spec_size=64,
        num_mel_bins=16,
    )
    text = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = transformers.ClapConfig(audio_config=audio.to_dict(), text_config=text)
    transformers.ClapModel(config).save_pretrained(tmp_path / "clap")
    transformers.ClapFeatureExtractor(feature_size=16, nb_max_samples=48000, max_length_s=1).save_pretrained(
        tmp_path / "clap"
    )
    return str(tmp_path / "clap")


@pytest.mark.parametrize("name", ["ast", "clap"])
def test_sound_and_silence_differ(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    source = front_end(f"transformers:{folder}")
    samples = np.random.default_rng(0).normal(scale=0.3, size=3 * 44_100)
    samples[44_100:88_200] = 0
    features = source.patches(samples, 44_100, 3)
    assert features.shape == (3, *source.shape)
    assert features[1].abs().max() == 0
    assert features[0].abs().max() > 0

    encoder = TransformersAudio(folder)
    embedding = encoder(features)
    assert embedding.shape == (3, 32)
    assert (embedding[1] == 0).all()
    assert (embedding[[0, 2]] != 0).any(dim=1).all()
    assert not embedding.requires_grad
    assert TransformersAudio(folder, num_tokens=3)(features).shape == (3, 3, 32)


def test_own_weights_are_loaded(ast: str) -> None:
    encoder = {"type": "TransformersAudio", "name": ast, "weights": "transformers", "num_tokens": 2}
    cfg = {**tiny({}), "audio_encoder": encoder}
    model = build_model(cfg)
    stored = transformers.ASTModel.from_pretrained(ast).state_dict()
    name = "layernorm.weight" if "layernorm.weight" in stored else next(iter(stored))
    with torch.no_grad():
        model.audio_encoder.network.state_dict()[name].fill_(7.0)
    load_pretrained(model, cfg)
    assert torch.equal(model.audio_encoder.network.state_dict()[name], stored[name])
    # two audio tokens per frame reach the head
    features = torch.randn(2, *front_end(f"transformers:{ast}").shape)
    out = model(features, torch.randn(2, 3, 64, 64))
    assert out.logits.shape == (2, 1, 64, 64)


def test_config_names_the_front_end(ast: str) -> None:
    assert TransformersAudio.front_end_of({"name": ast}) == TransformersAudio(ast).front_end == f"transformers:{ast}"
    first = front_end(f"transformers:{ast}").version
    other = Path(ast).parent / "other"
    transformers.ASTModel.from_pretrained(ast).save_pretrained(other)
    transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=96).save_pretrained(other)
    assert front_end(f"transformers:{other}").version != first  # another cache


def test_mistakes(ast: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was not found"):
        TransformersAudio(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"model\.audio_dim=32"):
        TransformersAudio(ast, audio_dim=128)
    bert = transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="not an audio encoder"):
        TransformersAudio(str(tmp_path / "bert"))
    with pytest.raises(ConfigError, match="no audio feature extractor"):
        front_end(f"transformers:{tmp_path / 'bert'}")
