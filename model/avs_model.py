"""The whole model: pictures and sound in, logits of the sounding objects out."""

from typing import NamedTuple

from torch import Tensor, nn

from model.backbones import TimmBackbone
from model.mask_head import MaskPredictor
from model.transformer import Transformer
from utils.registry import MODELS


class ModelOutput(NamedTuple):
    """Logits (N, K, H, W), mask feature after fusion (N, C, H / 4, W / 4), balance loss (scalar)."""

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

    def forward(self, log_mel: Tensor, frames: Tensor, vid_temporal_mask_flag: Tensor | None = None) -> ModelOutput:
        """Segment the sounding objects of each frame.

        Args:
            log_mel: the second of sound around each frame, (N, 1, 96, 64).
            frames: pictures, ImageNet-normalised, (N, 3, H, W).
            vid_temporal_mask_flag: (N,), 0 where a frame is padding: its maps, logits and mask feature become zero.

        Returns:
            ModelOutput.

        Raises:
            ValueError: shapes do not fit together.
        """
        return self.segment(self.vggish(self._checked(log_mel, frames)), self.backbone(frames), vid_temporal_mask_flag)

    def segment(
        self, embedding: Tensor, features: list[Tensor], vid_temporal_mask_flag: Tensor | None = None
    ) -> ModelOutput:
        """As `forward`, from what the backbones made: embedding (N, audio_dim), maps (N, channels[l], H_l, W_l)."""
        audio = self.audio_proj(embedding)[:, None]  # (N, 1, C)
        features = _mask_frames(features, vid_temporal_mask_flag)
        logits, mask_feature, aux_loss = self.head(features, audio, vid_temporal_mask_flag)
        logits, mask_feature = _mask_frames([logits, mask_feature], vid_temporal_mask_flag)
        return ModelOutput(logits, mask_feature, aux_loss)

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

    @staticmethod
    def _checked(log_mel: Tensor, frames: Tensor) -> Tensor:
        if frames.dim() != 4 or frames.shape[1] != 3:
            raise ValueError(f"frames must be (N, 3, H, W), got {tuple(frames.shape)}")
        if log_mel.shape != (frames.shape[0], 1, 96, 64):
            raise ValueError(
                f"log_mel must be (N, 1, 96, 64) with N = {frames.shape[0]} frames, got {tuple(log_mel.shape)}"
            )
        return log_mel


def _mask_frames(maps: list[Tensor], flag: Tensor | None) -> list[Tensor]:
    """Zero the maps (N, ...) of padded frames."""
    return maps if flag is None else [x * flag.to(x.dtype).view(-1, 1, 1, 1) for x in maps]
