"""The whole model: frames and log-mel in, logits of the sounding objects out."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.audio_norm import AudioNorm
from model.head import ModelOutput
from model.mask_classification import QueryMasks
from utils.registry import MODELS


@MODELS.register_module(name=["MoDAT", "AVSegFormer"])
class AVSModel(nn.Module):
    """MoDAT and AVSegFormer; the head's query generator and fusion block make the difference.

    Args:
        backbone: frames -> four feature maps.
        audio_encoder: log-mel -> embedding of D numbers per frame, or of A tokens per frame. Its attributes say what it
            takes and gives: `input_shape`, `audio_dim`, `front_end` (see dataloader/front_ends.py), `frozen`.
        head: feature maps and audio -> logits.
        audio_dim: D.
        audio_norm: normalisation of the embeddings, see `AudioNorm`; None leaves them as they are, as published.
        embed_dim: C.
        num_frames: T, frames per clip.
        neck: makes four maps of a backbone's only one, see `FeaturePyramid`; None for backbones with four.
    """

    def __init__(
        self,
        backbone: nn.Module,
        audio_encoder: nn.Module,
        head: nn.Module,
        audio_dim: int = 128,
        audio_norm: str | None = None,
        embed_dim: int = 256,
        num_frames: int = 5,
        neck: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.backbone = backbone
        self.neck = neck
        self.audio_encoder = audio_encoder
        self.audio_norm = None if audio_norm is None else AudioNorm(audio_norm, audio_dim)
        self.audio_proj = nn.Linear(audio_dim, embed_dim)
        self.head = head
        self._batch_norms = tuple(module for module in self.modules() if isinstance(module, _BatchNorm))
        self._backbone_frozen = False

    def forward(
        self,
        log_mel: Tensor,
        frames: Tensor,
        frame_mask: Tensor | None = None,
        frame_indices: Tensor | None = None,
        *,
        embedding: Tensor | None = None,
        features: list[Tensor] | None = None,
        real_indices: Tensor | None = None,
    ) -> ModelOutput:
        """Segment the sounding objects of each frame.

        Args:
            log_mel: log-mel of the second of audio around each frame, (N, *input_shape): (N, 1, 96, 64) for VGGish.
            frames: ImageNet-normalised, (N, 3, H, W).
            frame_mask: (N,), 0 for padded frames, whose features, logits and mask feature become zero.
            frame_indices: (A,), frames whose masks are predicted: the labelled ones in training, those without padding
                in evaluation; None for all. Queries are decoded for these frames only.
            embedding: precomputed output of `audio_encoder`, (N, D) or (N, A, D).
            features: precomputed outputs of `backbone`, (N, channels[l], H_l, W_l) each.
            real_indices: frames that are not padded, which `flagged_indices(frame_mask)` finds before the flag is moved
                to a GPU: the backbone leaves the others out. None: all frames go through it.

        Returns:
            ModelOutput of the A frames.

        Raises:
            ValueError: shapes do not fit together.
        """
        _check(log_mel, frames, getattr(self.audio_encoder, "input_shape", None))
        if frame_indices is not None and not self._couples_frames():
            # The other frames have no influence on these: leave them out from the start.
            log_mel, frames = log_mel[frame_indices], frames[frame_indices]
            embedding, frame_mask = (x if x is None else x[frame_indices] for x in (embedding, frame_mask))
            features = None if features is None else [x[frame_indices] for x in features]
            frame_indices = real_indices = None
        if embedding is None:
            embedding = self.audio_encoder(log_mel)
        features = (
            self._features(frames, frame_mask, real_indices) if features is None else _mask_frames(features, frame_mask)
        )
        if self.neck is not None:
            features = self.neck(features[0], tuple(frames.shape[-2:]))
        if self.audio_norm is not None:
            embedding = self.audio_norm(embedding)
        audio = self.audio_proj(embedding)  # (N, C) or (N, A, C)
        audio = audio[:, None] if audio.dim() == 2 else audio  # (N, A, C), A = 1 for one embedding per frame
        out: ModelOutput = self.head(features, audio, frame_mask, frame_indices)

        mask = frame_mask if frame_mask is None or frame_indices is None else frame_mask[frame_indices]
        logits, mask_feature, *layer_logits = _mask_frames([out.logits, out.mask_feature, *out.layer_logits], mask)
        query_masks = tuple(QueryMasks(*_mask_frames(list(found), mask)) for found in out.query_masks)
        return ModelOutput(logits, mask_feature, out.aux_loss, tuple(layer_logits), query_masks)

    def _couples_frames(self) -> bool:
        """Whether frames influence each other, by the head's blocks or by batch statistics."""
        return any(norm.training for norm in self._batch_norms) or getattr(self.head, "couples_frames", True)

    def _features(self, frames: Tensor, frame_mask: Tensor | None, real_indices: Tensor | None) -> list[Tensor]:
        """The backbone's maps (N, channels[l], H_l, W_l), zero for padded frames."""
        # Batch statistics are those of all frames, as published; a compiled graph has a fixed number of frames.
        whole = torch.compiler.is_compiling() or any(norm.training for norm in self._batch_norms)
        if whole or real_indices is None:
            return _mask_frames(self.backbone(frames), frame_mask)
        return [scatter_rows(x, real_indices, len(frames)) for x in self.backbone(frames[real_indices])]

    def freeze_backbone(self, freeze: bool = True) -> None:
        """Freeze the image backbone with its BatchNorm statistics, or with `freeze=False` train it again."""
        self._backbone_frozen = freeze
        self.backbone.requires_grad_(not freeze)
        self.train(self.training)

    def train(self, mode: bool = True) -> "AVSModel":
        """Set training mode; BatchNorm of a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self._backbone_frozen:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def set_activation_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of backbone, transformer and mask head in the backward pass: less memory, more time.

        Takes effect in modules with an attribute `use_checkpoint`, and in a backbone with timm's
        `set_grad_checkpointing`.
        """
        if hasattr(self.backbone, "set_grad_checkpointing"):
            self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]
        for module in self.head.modules():
            if hasattr(module, "use_checkpoint"):
                module.use_checkpoint = enable  # type: ignore[assignment]


def flagged_indices(flag: Tensor | None) -> Tensor | None:
    """Indices of the frames whose flag (N,) is not 0; None without a flag, or if all or no frames have it."""
    if flag is None:
        return None
    indices = flag.nonzero().squeeze(1)
    return indices if 0 < len(indices) < len(flag) else None


def scatter_rows(x: Tensor, indices: Tensor | None, count: int) -> Tensor:
    """Scatter rows x (A, ...) to `indices` (A,) of `count` rows of zeros; returns x if `indices` is None."""
    return x if indices is None else x.new_zeros(count, *x.shape[1:]).index_copy(0, indices, x)


def _check(log_mel: Tensor, frames: Tensor, input_shape: tuple[int, ...] | None) -> None:
    if frames.dim() != 4 or frames.shape[1] != 3:
        raise ValueError(f"frames must be (N, 3, H, W), got {tuple(frames.shape)}")
    expected = (frames.shape[0], *(input_shape or log_mel.shape[1:]))
    if log_mel.shape != expected:
        shape = ", ".join(map(str, expected[1:]))
        raise ValueError(f"log_mel must be (N, {shape}) with N = {expected[0]} frames, got {tuple(log_mel.shape)}")


def _mask_frames(maps: list[Tensor], frame_mask: Tensor | None) -> list[Tensor]:
    """Zero the maps (N, ...) of padded frames."""
    if frame_mask is None:
        return maps
    return [x * frame_mask.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) for x in maps]
