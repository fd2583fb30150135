"""A frozen VGGish hears each sound once."""

from pathlib import Path

import torch
from torch import Tensor, nn

from model.vggish import VGGish
from utils.audio_cache import AudioEmbeddings, weights_hash


class Counting(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vggish = VGGish(channels=(4, 4, 8, 8), hidden_dim=16, audio_dim=8)
        self.calls = 0

    def forward(self, log_mel: Tensor) -> Tensor:
        self.calls += 1
        return self.vggish(log_mel)


def sounds() -> Tensor:
    return torch.randn(3, 5, 1, 96, 64, generator=torch.Generator().manual_seed(0))


def test_embeddings_are_vggishs_and_computed_once(tmp_path: Path) -> None:
    vggish = Counting(0)
    embeddings = AudioEmbeddings(vggish, tmp_path)
    first = embeddings(sounds())
    torch.testing.assert_close(first, vggish.vggish(sounds().flatten(0, 1)), rtol=1e-5, atol=1e-6)
    assert first.std() > 0 and vggish.calls == 3
    assert torch.equal(embeddings(sounds().flip(0)), first.view(3, 5, -1).flip(0).flatten(0, 1)) and vggish.calls == 3

    again = AudioEmbeddings(vggish, tmp_path)
    assert torch.equal(again(sounds()), first) and vggish.calls == 3


def test_a_clips_embedding_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    vggish = Counting(0)
    together = AudioEmbeddings(vggish, tmp_path / "a")(sounds())
    alone = [AudioEmbeddings(vggish, tmp_path / "b")(clip[None]) for clip in sounds()]
    assert torch.equal(torch.cat(alone), together)


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    vggish = Counting(0)
    first = AudioEmbeddings(vggish, tmp_path)(sounds())
    for path in tmp_path.rglob("*.f32"):
        path.write_bytes(path.read_bytes()[:-6])
    assert torch.equal(AudioEmbeddings(vggish, tmp_path)(sounds()), first) and vggish.calls == 6


def test_other_weights_never_share_embeddings(tmp_path: Path) -> None:
    one, other = Counting(0), Counting(1)
    assert weights_hash(one) != weights_hash(other) and weights_hash(one) == weights_hash(Counting(0))
    assert not torch.equal(AudioEmbeddings(one, tmp_path)(sounds()), AudioEmbeddings(other, tmp_path)(sounds()))
    assert other.calls == 3
