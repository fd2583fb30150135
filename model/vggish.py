"""VGGish: one second of sound as a vector (Hershey et al., 2017)."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from model.checkpoint import load_pca, load_vggish
from utils.registry import AUDIO_ENCODERS

MEL_FRAMES, MEL_BANDS = 96, 64


@AUDIO_ENCODERS.register_module()
class VGGish(nn.Module):
    """Convolutions over a log-mel patch, and three fully connected layers.

    Args:
        freeze_audio_extractor: keep the weights as they are and record no gradient, as published. Turn off to train it,
            where no pretrained weights are at hand.
        pretrained_vggish_model_path: AVSBench's `vggish-10086976.pth`; random weights when None.
        preprocess_audio_to_log_mel: published key; True makes the data sets read wave files (see utils.config).
        postprocess_log_mel_with_pca: project the embedding by VGGish's PCA, clip it to [-2, 2] and round it to 8 bits.
        pretrained_pca_params_path: file of the PCA, needed where it is switched on.
        channels: widths of the four convolution stages; the last two stages have two convolutions.
        hidden_dim: width of the first two fully connected layers.
        audio_dim: size of the embedding.
        batch_norm: normalise each layer over the batch (Ioffe & Szegedy, 2015): for training from random weights, which
            nine plain layers take long to leave. No pretrained file has it.
    """

    def __init__(
        self,
        freeze_audio_extractor: bool = True,
        pretrained_vggish_model_path: str | Path | None = None,
        preprocess_audio_to_log_mel: bool = False,
        postprocess_log_mel_with_pca: bool = False,
        pretrained_pca_params_path: str | Path | None = None,
        channels: Sequence[int] = (64, 128, 256, 512),
        hidden_dim: int = 4096,
        audio_dim: int = 128,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if len(channels) != 4:
            raise ValueError(f"VGGish has four stages, got channels={tuple(channels)}")
        self.frozen = freeze_audio_extractor
        self.features = _convolutions(channels, batch_norm)
        widths = (channels[-1] * (MEL_FRAMES // 16) * (MEL_BANDS // 16), hidden_dim, hidden_dim, audio_dim)
        self.embeddings = nn.Sequential()
        for width, out in pairwise(widths):
            norm = [nn.BatchNorm1d(out)] if batch_norm else []
            self.embeddings.extend([nn.Linear(width, out), *norm, nn.ReLU()])
        self.pca = PrincipalComponents(audio_dim) if postprocess_log_mel_with_pca else None
        if pretrained_vggish_model_path is None:
            self._initialise()
        self._load(pretrained_vggish_model_path, pretrained_pca_params_path)
        if self.frozen:
            self.requires_grad_(False)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Log-mel patches (N, 1, 96, 64) -> embeddings (N, audio_dim)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.features(log_mel)  # (N, channels, 6, 4)
            embedding = self.embeddings(maps.permute(0, 2, 3, 1).flatten(1))
            return embedding if self.pca is None else self.pca(embedding)

    def _initialise(self) -> None:
        # Each layer keeps the variance of its input (He et al., 2015): PyTorch's default start shrinks it by half an
        # order a layer, and nine layers of random weights would tell all sounds alike.
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def _load(self, weights_path: str | Path | None, pca_path: str | Path | None) -> None:
        if weights_path is not None:
            load_vggish(self, weights_path)
        if self.pca is not None:
            load_pca(self.pca, pca_path)


class PrincipalComponents(nn.Module):
    """VGGish's post-processing: rotation, clipping to [-2, 2], 8 bits.

    Args:
        dim: size of the embedding.
    """

    pca_eigen_vectors: Tensor
    pca_means: Tensor

    def __init__(self, dim: int = 128) -> None:
        super().__init__()
        self.register_buffer("pca_eigen_vectors", torch.eye(dim))
        self.register_buffer("pca_means", torch.zeros(dim, 1))

    def forward(self, embedding: Tensor) -> Tensor:
        """Embeddings (N, dim) -> whole numbers in 0..255 as floats (N, dim)."""
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
