"""VGGish: an embedding of one second of audio (Hershey et al., 2017)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from utils.registry import MODELS

MEL_FRAMES, MEL_BANDS = 96, 64
SILENCE = math.log(0.01) + 1e-4
"""Log-mel of digital silence, log(0 + 0.01), with room for rounding."""


@MODELS.register_module()
class VGGish(nn.Module):
    """Convolutions over a log-mel patch, and three fully connected layers.

    Args:
        frozen: keep the weights fixed, as published; False trains them, e.g. from random initialisation.
        pca: post-process the embedding: VGGish's PCA, clipping to [-2, 2], quantisation to 8 bits.
        channels: widths of the four convolution stages; the last two stages have two convolutions.
        hidden_dim: width of the first two fully connected layers.
        audio_dim: size of the embedding.
        batch_norm: batch normalisation after each layer (Ioffe & Szegedy, 2015), for training from random
            initialisation; the pretrained weights have none.
        mark_silence: zero the embedding of digital silence, so that `AudioNorm` can tell it apart; off as published.

    Raises:
        ValueError: `channels` does not have four widths.
    """

    front_end = "vggish"
    input_shape = (1, MEL_FRAMES, MEL_BANDS)

    def __init__(
        self,
        frozen: bool = True,
        pca: bool = False,
        channels: Sequence[int] = (64, 128, 256, 512),
        hidden_dim: int = 4096,
        audio_dim: int = 128,
        batch_norm: bool = False,
        mark_silence: bool = False,
    ) -> None:
        super().__init__()
        if len(channels) != 4:
            raise ValueError(f"VGGish has four stages, got channels={tuple(channels)}")
        self.frozen = frozen
        self.audio_dim = audio_dim
        self.mark_silence = mark_silence
        self.features = _convolutions(channels, batch_norm)
        widths = (channels[-1] * (MEL_FRAMES // 16) * (MEL_BANDS // 16), hidden_dim, hidden_dim, audio_dim)
        self.embeddings = nn.Sequential()
        for width, out in pairwise(widths):
            norm = [nn.BatchNorm1d(out)] if batch_norm else []
            self.embeddings.extend([nn.Linear(width, out), *norm, nn.ReLU()])
        self.pca = PrincipalComponents(audio_dim) if pca else None
        self._initialise()
        if self.frozen:
            self.requires_grad_(False)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Log-mel patches (N, 1, 96, 64) -> embeddings (N, audio_dim)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.features(log_mel)  # (N, channels, 6, 4)
            embedding = self.embeddings(maps.permute(0, 2, 3, 1).flatten(1))
            embedding = embedding if self.pca is None else self.pca(embedding)
            if self.mark_silence:
                silent = log_mel.flatten(1).amax(dim=1) <= SILENCE
                embedding = embedding.masked_fill(silent[:, None], 0.0)
            return embedding

    def _initialise(self) -> None:
        # He initialisation (He et al., 2015) keeps the variance of activations; PyTorch's default shrinks it by about
        # half an order of magnitude per layer, and the embeddings of all sounds would be nearly equal.
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]


class PrincipalComponents(nn.Module):
    """VGGish's post-processing: PCA, clipping to [-2, 2], quantisation to 8 bits.

    Args:
        audio_dim: size of the embedding.
    """

    pca_eigen_vectors: Tensor
    pca_means: Tensor

    def __init__(self, audio_dim: int = 128) -> None:
        super().__init__()
        self.register_buffer("pca_eigen_vectors", torch.eye(audio_dim))
        self.register_buffer("pca_means", torch.zeros(audio_dim, 1))

    def forward(self, embedding: Tensor) -> Tensor:
        """Embeddings (N, audio_dim) -> integers in 0..255 as floats (N, audio_dim)."""
        rotated = (embedding - self.pca_means.T) @ self.pca_eigen_vectors.T
        return torch.round((rotated.clamp(-2.0, 2.0) + 2.0) * (255.0 / 4.0))


def _convolutions(channels: Sequence[int], batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 1
    for stage, out in enumerate(channels):
        for _ in range(1 if stage < 2 else 2):
            norm = [nn.BatchNorm2d(out)] if batch_norm else []
            layers += [nn.Conv2d(width, out, kernel_size=3, padding=1), *norm, nn.ReLU(inplace=True)]
            width = out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)
