"""Normalisation of audio embeddings, between a pretrained encoder and the projection to C channels.

The outputs of an encoder that ends in ReLU are positive, with a large part common to all sounds, and the layers behind
pass on mostly that part. Subtracting the mean over the training sounds and dividing by the deviation, per dimension,
removes it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from utils.errors import ConfigError

MODES = ("standardise", "layer", "batch")


class AudioNorm(nn.Module):
    """Normalises embeddings; digital silence becomes a learned embedding of its own.

    An embedding of zeros is silence: encoders return it for digital silence (see `AiSFX`, and `mark_silence` of
    `VGGish`). Silence takes part in no statistics.

    Args:
        mode: 'standardise' (mean and deviation per dimension over the training sounds, from `fit`), 'layer' (LayerNorm
            per embedding) or 'batch' (BatchNorm).
        audio_dim: D.

    Raises:
        ConfigError: an unknown mode.
    """

    mean: Tensor
    deviation: Tensor
    fitted: Tensor

    def __init__(self, mode: str, audio_dim: int) -> None:
        super().__init__()
        if mode not in MODES:
            raise ConfigError(
                f"model.audio_norm={mode!r} is not one of None, {', '.join(repr(known) for known in MODES)}."
            )
        self.mode = mode
        self.silence = nn.Parameter(torch.randn(audio_dim))
        self.norm: nn.Module | None = None
        if mode == "standardise":
            self.register_buffer("mean", torch.zeros(audio_dim))
            self.register_buffer("deviation", torch.ones(audio_dim))
            self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        elif mode == "layer":
            self.norm = nn.LayerNorm(audio_dim)
        else:
            self.norm = nn.BatchNorm1d(audio_dim)

    def needs_statistics(self) -> bool:
        """Whether `fit` has to be called before training."""
        return self.mode == "standardise" and not bool(self.fitted)

    @torch.no_grad()
    def fit(self, embeddings: Iterable[Tensor]) -> None:
        """Take mean and deviation per dimension over embeddings of training sounds, silence left out.

        Args:
            embeddings: tensors (..., D), one pass.
        """
        count = 0
        total = torch.zeros_like(self.mean, dtype=torch.float64)
        squares = torch.zeros_like(total)
        for each in embeddings:
            rows = each.flatten(0, -2).double()
            rows = rows[(rows != 0).any(dim=-1)]
            count += len(rows)
            total += rows.sum(dim=0).to(total.device)
            squares += rows.square().sum(dim=0).to(total.device)
        mean = total / max(count, 1)
        deviation = (squares / max(count, 1) - mean.square()).clamp(min=0).sqrt()
        # A dimension that never varies says nothing; dividing by a floor keeps it at zero.
        floor = 1e-3 * deviation.mean().clamp(min=1e-6)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp(min=floor))
        self.fitted.fill_(True)

    def forward(self, embedding: Tensor) -> Tensor:
        """Embeddings (N, D) or (N, A, D) of A tokens -> the same shape."""
        silent = (embedding == 0).all(dim=-1, keepdim=True)
        if self.norm is None:
            out = (embedding - self.mean) / self.deviation
        elif isinstance(self.norm, nn.LayerNorm):
            out = self.norm(embedding)
        else:
            out = self._batch_norm(embedding, silent)
        return torch.where(silent, self.silence.to(out.dtype), out)

    def _batch_norm(self, embedding: Tensor, silent: Tensor) -> Tensor:
        assert self.norm is not None
        rows, sounding = embedding.flatten(0, -2), ~silent.flatten()
        if self.training and int(sounding.sum()) > 1:
            out = torch.zeros_like(rows).index_put((sounding,), self.norm(rows[sounding]).to(rows.dtype))
        else:
            norm = self.norm
            assert isinstance(norm, nn.BatchNorm1d)
            out = nn.functional.batch_norm(
                rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
            )
        return out.view_as(embedding)
