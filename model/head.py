"""The segmentation head: everything between the backbones and the logits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.layers.initialisation import initialise
from model.mask_head import MaskPredictor, PixelDecoder
from utils.registry import HEADS


class HeadOutput(NamedTuple):
    """Logits (A, K, H, W), fused mask feature (A, C, H / 4, W / 4) and balance loss (scalar), of A answered frames."""

    logits: Tensor
    mask_feature: Tensor
    aux_loss: Tensor


@HEADS.register_module(name=["SegHead", "AVSegHead"])
class SegHead(nn.Module):
    """Sound becomes queries, pictures become memory and a mask feature, and their comparison becomes masks.

    Args:
        in_channels: channels of the backbone's four maps.
        query_generator: makes queries and audio tokens of the sound.
        transformer: encodes the pixels and decodes the queries.
        positional_encoding: of the pixels.
        fusion_block: lets the sound change the mask feature; skipped when None.
        num_classes: K.
        query_num: Q.
        use_learnable_queries: add a learned vector to each query.
        embed_dim: C.
        valid_indices: maps that the encoder reads.
        scale_factor: ratio of logits to mask feature.
        num_groups: of the group normalisations.
        mask_hidden_dim: width of the mask MLP.
        head_dims: channels of the convolutions that make the logits.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        query_generator: nn.Module,
        transformer: nn.Module,
        positional_encoding: nn.Module,
        fusion_block: nn.Module | None = None,
        num_classes: int = 1,
        query_num: int = 300,
        use_learnable_queries: bool = True,
        embed_dim: int = 256,
        valid_indices: Sequence[int] = (1, 2, 3),
        scale_factor: int = 4,
        num_groups: int = 32,
        mask_hidden_dim: int = 2048,
        head_dims: Sequence[int] = (128, 32),
    ) -> None:
        super().__init__()
        if embed_dim % num_groups:
            raise ValueError(f"embed_dim={embed_dim} is not a multiple of num_groups={num_groups}")
        self.valid_indices = tuple(valid_indices)
        self.in_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, embed_dim, kernel_size=1), nn.GroupNorm(num_groups, embed_dim))
            for channels in in_channels
        )
        self.level_embed = nn.Parameter(torch.empty(len(self.valid_indices), embed_dim))
        self.learnable_query = nn.Embedding(query_num, embed_dim) if use_learnable_queries else None
        self.positional_encoding = positional_encoding
        self.query_generator = query_generator
        self.transformer = transformer
        self.pixel_decoder = PixelDecoder(embed_dim, num_groups)
        self.fusion_block = fusion_block
        self.mask_predictor = MaskPredictor(embed_dim, query_num, num_classes, mask_hidden_dim, head_dims, scale_factor)
        initialise(self)
        nn.init.normal_(self.level_embed)

    @property
    def frames_share(self) -> bool:
        """Whether frames act on each other or, in training, share a loss, so that none can be left out.

        A block that does not say it by an attribute of this name is taken to do so.
        """
        blocks = [block for block in (self.query_generator, self.fusion_block) if block is not None]
        return any(getattr(block, "frames_share", True) for block in blocks)

    def forward(
        self,
        features: Sequence[Tensor],
        audio: Tensor,
        frame_mask: Tensor | None = None,
        answered: Tensor | None = None,
    ) -> HeadOutput:
        """Find what sounds.

        Args:
            features: the backbone's maps, finest first, (N, in_channels[l], H_l, W_l).
            audio: the sound of each frame, (N, 1, C).
            frame_mask: (N,), 0 where a frame is padding.
            answered: (A,), indices of the frames to answer for; None: all.
        """
        finest = self.in_proj[0](features[0])
        levels = [self.in_proj[index](features[index]) for index in self.valid_indices]
        shapes = tuple((level.shape[2], level.shape[3]) for level in levels)

        queries, audio_tokens = self.query_generator(audio, levels, frame_mask)
        queries = queries if answered is None else queries[answered]
        if self.learnable_query is not None:
            queries = queries + self.learnable_query.weight

        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # (N, L, C)
        memory, queries = self.transformer(queries, tokens, self._position(shapes, tokens), shapes, answered)

        height, width = shapes[0]
        memory_map = memory[:, : height * width].transpose(1, 2).unflatten(2, (height, width))
        mask_feature = self.pixel_decoder(finest, memory_map)
        aux_loss = mask_feature.new_zeros(())
        if self.fusion_block is not None:
            mask_feature, aux_loss = self.fusion_block(mask_feature, audio_tokens)
        if answered is not None:
            # Taken with a pixel's channels side by side: the gradient, zero elsewhere, then lies as the map does.
            mask_feature = mask_feature.movedim(1, 3)[answered].movedim(3, 1)
        return HeadOutput(self.mask_predictor(queries, mask_feature), mask_feature, aux_loss)

    def _position(self, shapes: tuple[tuple[int, int], ...], tokens: Tensor) -> Tensor:
        """Position and level of each pixel, (L, C), in the tokens' precision."""
        levels = [
            self.positional_encoding(height, width, tokens.device) + self.level_embed[index]
            for index, (height, width) in enumerate(shapes)
        ]
        return torch.cat(levels).to(tokens.dtype)
