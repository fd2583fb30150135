"""The segmentation head: everything between the backbones and the logits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.layers.initialisation import initialise
from model.mask_classification import QueryMasks
from model.transformer import Transformer
from utils.registry import MODELS


class ModelOutput(NamedTuple):
    """Output for A frames.

    Attributes:
        logits: (A, K, H, W).
        mask_feature: fused mask feature, (A, C, H / 4, W / 4).
        aux_loss: balance loss (scalar).
        layer_logits: with deep supervision, in training: logits (A, K, H, W) of each decoder layer but the last.
        query_masks: of a mask head that classifies queries: classes and masks, as the logits are merged from; in
            training with deep supervision, of every decoder layer, the last one last.
    """

    logits: Tensor
    mask_feature: Tensor
    aux_loss: Tensor
    layer_logits: tuple[Tensor, ...] = ()
    query_masks: tuple[QueryMasks, ...] = ()


@MODELS.register_module()
class SegHead(nn.Module):
    """Generates queries from audio, encodes pixels into memory and mask feature, and predicts masks from both.

    Args:
        in_channels: channels of the backbone's four maps.
        query_generator: audio -> queries and audio tokens.
        transformer: with an `encoder` of the pixels and a `decoder` of the queries.
        positional_encoding: of the pixels.
        pixel_decoder: finest map and memory -> mask feature.
        mask_head: queries and mask feature -> logits; or -> QueryMasks, with a method `merge` that makes them logits.
        fusion_block: fuses audio into the mask feature; None leaves it out.
        num_queries: Q.
        use_learnable_queries: add a learned embedding to each query.
        embed_dim: C.
        valid_indices: backbone maps that the encoder reads.
        num_groups: groups of the input projections' GroupNorm.
        deep_supervision: in training, predict masks from the queries of every decoder layer with the same mask head,
            for losses on each (auxiliary losses of DETR, Carion et al., 2020). Costs a pass of the mask head per layer;
            evaluation is unchanged.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        query_generator: nn.Module,
        transformer: Transformer,
        positional_encoding: nn.Module,
        pixel_decoder: nn.Module,
        mask_head: nn.Module,
        fusion_block: nn.Module | None = None,
        num_queries: int = 300,
        use_learnable_queries: bool = True,
        embed_dim: int = 256,
        valid_indices: Sequence[int] = (1, 2, 3),
        num_groups: int = 32,
        deep_supervision: bool = False,
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
        self.learnable_query = nn.Embedding(num_queries, embed_dim) if use_learnable_queries else None
        self.positional_encoding = positional_encoding
        self.query_generator = query_generator
        self.transformer = transformer
        self.pixel_decoder = pixel_decoder
        self.fusion_block = fusion_block
        self.mask_head = mask_head
        self.deep_supervision = deep_supervision
        initialise(self)
        nn.init.normal_(self.level_embed)

    @property
    def couples_frames(self) -> bool:
        """Whether frames influence each other, or share a loss in training; True for blocks that do not say."""
        blocks = [block for block in (self.query_generator, self.fusion_block) if block is not None]
        return any(getattr(block, "couples_frames", True) for block in blocks)

    def forward(
        self,
        features: Sequence[Tensor],
        audio: Tensor,
        frame_mask: Tensor | None = None,
        frame_indices: Tensor | None = None,
    ) -> ModelOutput:
        """Segment the sounding objects.

        Args:
            features: the backbone's maps, finest first, (N, in_channels[l], H_l, W_l).
            audio: audio embedding of each frame, (N, 1, C).
            frame_mask: (N,), 0 for padded frames.
            frame_indices: (A,), frames whose masks are predicted; None for all.

        Returns:
            ModelOutput of the A frames.
        """
        finest = self.in_proj[0](features[0])
        levels = [self.in_proj[index](features[index]) for index in self.valid_indices]
        shapes = tuple((level.shape[2], level.shape[3]) for level in levels)

        queries, audio_tokens, query_loss = self.query_generator(audio, levels, frame_mask)  # (N, Q, C), (N, A, C)

        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # (N, L, C)
        memory = self.transformer.encoder(tokens, self._position(shapes, tokens), shapes)  # (N, L, C)
        height, width = shapes[0]
        memory_map = memory[:, : height * width].transpose(1, 2).unflatten(2, (height, width))
        mask_feature = self.pixel_decoder(finest, memory_map)  # (N, C, H / 4, W / 4)
        aux_loss = mask_feature.new_zeros(())
        if self.fusion_block is not None:
            mask_feature, aux_loss = self.fusion_block(mask_feature, audio_tokens)
        aux_loss = aux_loss + query_loss

        if frame_indices is not None:
            queries, memory = queries[frame_indices], memory[frame_indices]
            # Index in channels_last, so that the gradient stays channels_last.
            mask_feature = mask_feature.movedim(1, 3)[frame_indices].movedim(3, 1)
        if self.learnable_query is not None:
            queries = queries + self.learnable_query.weight
        decoded = self.transformer.decoder(queries, memory)  # (A, Q, C) per layer
        if not (self.deep_supervision and self.training):
            decoded = decoded[-1:]
        *earlier, last = (self.mask_head(queries, mask_feature) for queries in decoded)
        if isinstance(last, Tensor):
            return ModelOutput(last, mask_feature, aux_loss, layer_logits=tuple(earlier))
        logits = self.mask_head.merge(last)  # type: ignore[operator]
        return ModelOutput(logits, mask_feature, aux_loss, query_masks=(*earlier, last))

    def _position(self, shapes: tuple[tuple[int, int], ...], tokens: Tensor) -> Tensor:
        """Positional encoding plus level embedding of each pixel, (L, C), in the tokens' dtype."""
        levels = [
            self.positional_encoding(height, width, tokens.device) + self.level_embed[index]
            for index, (height, width) in enumerate(shapes)
        ]
        return torch.cat(levels).to(tokens.dtype)
