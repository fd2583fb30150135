"""The whole model: pictures and sound in, logits of the sounding objects out."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.backbones import TimmBackbone
from model.mask_head import MaskPredictor
from model.transformer import Transformer
from utils.registry import MODELS


class ModelOutput(NamedTuple):
    """Logits (A, K, H, W), fused mask feature (A, C, H / 4, W / 4) and balance loss (scalar), of A answered frames."""

    logits: Tensor
    mask_feature: Tensor
    aux_loss: Tensor


@MODELS.register_module(name=["MoDAT", "AVSegFormer"])
class AVSModel(nn.Module):
    """MoDAT and AVSegFormer: which of them is a matter of the head's query generator and fusion block.

    Args:
        backbone: pictures -> four maps.
        vggish: log-mel -> embedding of `audio_dim`.
        head: maps and sound -> logits.
        audio_dim: size of the audio embedding.
        embed_dim: C.
        num_frames: T, frames a clip.
    """

    def __init__(
        self,
        backbone: nn.Module,
        vggish: nn.Module,
        head: nn.Module,
        audio_dim: int = 128,
        embed_dim: int = 256,
        num_frames: int = 5,
    ) -> None:
        super().__init__()
        self.T = num_frames
        self.backbone = backbone
        self.vggish = vggish
        self.audio_proj = nn.Linear(audio_dim, embed_dim)
        self.head = head
        self._batch_norm = any(isinstance(module, _BatchNorm) for module in self.modules())

    def forward(
        self,
        log_mel: Tensor,
        frames: Tensor,
        vid_temporal_mask_flag: Tensor | None = None,
        answered: Tensor | None = None,
        *,
        embedding: Tensor | None = None,
        features: list[Tensor] | None = None,
    ) -> ModelOutput:
        """Segment the sounding objects of each frame.

        Args:
            log_mel: the second of sound around each frame, (N, 1, 96, 64).
            frames: pictures, ImageNet-normalised, (N, 3, H, W).
            vid_temporal_mask_flag: (N,), 0 where a frame is padding: its maps, logits and mask feature become zero.
            answered: (A,), indices of the frames to answer for: in training those with a label, as no other logits
                would have a gradient, in evaluation those that are not padding. The other frames are followed as far as
                they act on these, or in training on the balance loss. None: all.
            embedding: what `vggish` says of the sound, (N, audio_dim), where that is known.
            features: what `backbone` says of the pictures, (N, channels[l], H_l, W_l) each, where that is known.

        Returns:
            ModelOutput.

        Raises:
            ValueError: shapes do not fit together.
        """
        _check(log_mel, frames)
        flag = vid_temporal_mask_flag
        if answered is not None and not self._frames_share():
            log_mel, frames = log_mel[answered], frames[answered]
            flag, embedding = _rows(flag, answered), _rows(embedding, answered)
            features = features and [x[answered] for x in features]
            answered = None
        if embedding is None:
            embedding = self.vggish(log_mel)
        maps = self._maps(frames, flag) if features is None else _mask_frames(features, flag)

        audio = self.audio_proj(embedding)[:, None]  # (N, 1, C)
        logits, mask_feature, aux_loss = self.head(maps, audio, flag, answered)
        logits, mask_feature = _mask_frames([logits, mask_feature], _rows(flag, answered))
        return ModelOutput(logits, mask_feature, aux_loss)

    def _frames_share(self) -> bool:
        return self._statistics_of_all() or getattr(self.head, "frames_share", True)

    def _statistics_of_all(self) -> bool:
        return self.training and self._batch_norm

    def _maps(self, frames: Tensor, flag: Tensor | None) -> list[Tensor]:
        """The backbone's maps (N, channels[l], H_l, W_l), zero for padded frames, which it need not see."""
        # A compiler would have to ask how many are real.
        real = None if torch.compiler.is_compiling() or self._statistics_of_all() else places(flag)
        if real is None:
            return _mask_frames(self.backbone(frames), flag)
        return [among_zeros(x, real, len(frames)) for x in self.backbone(frames[real])]

    def freeze_backbone(self, freeze: bool = True) -> None:
        """Stop, or start again, the training of the picture backbone."""
        self.backbone.requires_grad_(not freeze)

    def set_activation_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of backbone, transformer and mask MLP in the backward pass: less memory, more time."""
        if isinstance(self.backbone, TimmBackbone):
            self.backbone.set_grad_checkpointing(enable)
        for module in self.head.modules():
            if isinstance(module, Transformer | MaskPredictor):
                module.checkpointing = enable


def places(flag: Tensor | None) -> Tensor | None:
    """Indices of the frames whose flag, of (N,), is set; None where all are, or none is, or there is no flag."""
    if flag is None:
        return None
    found = flag.nonzero().squeeze(1)
    return found if 0 < len(found) < len(flag) else None


def among_zeros(x: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """`count` rows of zeros, but for the rows (A, ...) of x in their places (A,); x itself where these are None."""
    return x if rows is None else x.new_zeros(count, *x.shape[1:]).index_copy(0, rows, x)


def _check(log_mel: Tensor, frames: Tensor) -> None:
    if frames.dim() != 4 or frames.shape[1] != 3:
        raise ValueError(f"frames must be (N, 3, H, W), got {tuple(frames.shape)}")
    if log_mel.shape != (frames.shape[0], 1, 96, 64):
        raise ValueError(
            f"log_mel must be (N, 1, 96, 64) with N = {frames.shape[0]} frames, got {tuple(log_mel.shape)}"
        )


def _rows(x: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """Some rows of a tensor, where there are both."""
    return x if x is None or rows is None else x[rows]


def _mask_frames(maps: list[Tensor], flag: Tensor | None) -> list[Tensor]:
    """Zero the maps (N, ...) of padded frames."""
    return maps if flag is None else [x * flag.to(x.dtype).view(-1, 1, 1, 1) for x in maps]
