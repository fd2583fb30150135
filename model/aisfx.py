"""aiSFX: a sound-effects encoder (Cantil & Serra, ISMIR 2022), trained on sound libraries with the UCS categories."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.registry import MODELS

MEL_FRAMES, MEL_BANDS = 41, 96
WIDTHS = (64, 128, 256, 512)
POOLS = (2, 2, 2, 1)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and ReLU, then max pooling.

    Args:
        in_channels: of the input.
        out_channels: of both convolutions.
        pool: kernel and stride of the pooling.
    """

    def __init__(self, in_channels: int, out_channels: int, pool: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, time, mel) -> (N, out_channels, time / pool, mel / pool)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.max_pool2d(x, self.pool) if self.pool > 1 else x


@MODELS.register_module()
class AiSFX(nn.Module):
    """One embedding of 512 numbers, 0 or above, per second of sound; zeros for digital silence.

    The front end normalises each window by its peak, which hides loudness. Silent windows are therefore marked: their
    log-mel is zero, and so is their embedding.

    Args:
        frozen: keep the weights and the BatchNorm statistics as they are, and record no gradient.
        audio_dim: size of the embedding, always 512.

    Raises:
        ValueError: another `audio_dim`.
    """

    front_end = "aisfx"
    input_shape = (1, MEL_FRAMES, MEL_BANDS)

    def __init__(self, frozen: bool = True, audio_dim: int = WIDTHS[-1]) -> None:
        super().__init__()
        if audio_dim != WIDTHS[-1]:
            raise ValueError(f"AiSFX has embeddings of {WIDTHS[-1]} numbers: set model.audio_dim={WIDTHS[-1]}")
        self.frozen = frozen
        self.audio_dim = audio_dim
        width = 1
        for number, (out, pool) in enumerate(zip(WIDTHS, POOLS, strict=True), start=1):
            self.add_module(f"conv_block{number}", ConvBlock(width, out, pool))
            width = out
        if frozen:
            self.requires_grad_(False)

    def train(self, mode: bool = True) -> "AiSFX":
        """A frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Log-mel patches (N, 1, 41, 96) -> embeddings (N, 512)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = log_mel
            for block in self.children():
                x = block(x)
            embedding = x.mean(dim=3).amax(dim=2)
            silent = log_mel.flatten(1).amax(dim=1) <= 0
            return embedding.masked_fill(silent[:, None], 0.0)
