"""Fusion blocks: audio modulates the mask feature before the queries are compared with it.

A fusion block is a module registered in MODELS with `forward(mask_feature (N, C, H, W), audio_tokens (N, A, C)) ->
FusionOutput`; model/README.md shows how to add one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.dropout import Dropout
from model.moe import ChannelExperts, MixtureOfExperts, SecondChoice, SpatialExperts, Top2Router
from utils.registry import MODELS


class FusionOutput(NamedTuple):
    """The fused mask feature (N, C, H, W) and the block's balance loss (scalar, 0 without one)."""

    feature: Tensor
    aux_loss: Tensor


@MODELS.register_module()
class CrossModalMixer(nn.Module):
    """Channel attention of AVSegFormer: the audio attends to all pixels, and the result gates the channels.

    Args:
        embed_dim: C.
        num_heads: h, attention heads.
        qkv_bias: whether queries, keys and values have biases.
        dropout: dropout rate of the gates, before the sigmoid.
    """

    couples_frames = False

    def __init__(self, embed_dim: int = 256, num_heads: int = 8, qkv_bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=qkv_bias)
        self.kv_proj = nn.Linear(embed_dim, 2 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, mask_feature: Tensor, audio_tokens: Tensor) -> FusionOutput:
        """Mask feature (N, C, H, W) and audio tokens (N, A, C) -> gated mask feature."""
        audio = audio_tokens.mean(dim=1, keepdim=True)
        tokens = mask_feature.flatten(2).transpose(1, 2)  # (N, H * W, C)
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.q_proj(audio), *self.kv_proj(tokens).chunk(2, dim=-1))
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)  # (N, 1, C)
        gate = torch.sigmoid(self.dropout(self.proj(attended)))
        return FusionOutput(mask_feature * gate.transpose(1, 2)[..., None], mask_feature.new_zeros(()))


@MODELS.register_module()
class DualAttentionMoE(nn.Module):
    """Dual-attention mixture of experts of MoDAT: channel and spatial experts, weighted per pixel.

    Args:
        positional_encoding: of the pixels, added to the mask feature; the head's.
        embed_dim: C.
        num_heads: attention heads per expert.
        num_experts: E, per branch.
        branches: 'both', 'channel' or 'spatial'.
        dropout: see ChannelExperts and SpatialExperts.
        second_policy_train: see moe.SecondChoice.
        second_policy_eval: the same in evaluation.
        second_threshold_train: see moe.SecondChoice.
        second_threshold_eval: the same in evaluation.
        capacity_factor_train: see moe.SecondChoice.
        capacity_factor_eval: the same in evaluation.
        min_capacity: see moe.SecondChoice.
        loss_coef: weight of the balance loss.
        audio_tokens: see SpatialExperts.
        pad_capacity: see ChannelExperts.
        residual: add the mask feature to the output, so that tokens beyond an expert's capacity keep their feature; off
            as published, where they become zero.
        seed: seed of the 'random' policy in evaluation.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        positional_encoding: nn.Module,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_experts: int = 16,
        branches: str = "both",
        dropout: float = 0.4,
        second_policy_train: str = "random",
        second_policy_eval: str = "random",
        second_threshold_train: float = 0.2,
        second_threshold_eval: float = 0.2,
        capacity_factor_train: float = 1.0,
        capacity_factor_eval: float = 2.0,
        min_capacity: int = 4,
        loss_coef: float = 0.01,
        audio_tokens: str = "mean",
        pad_capacity: bool = True,
        residual: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.residual = residual
        if branches not in ("both", "channel", "spatial"):
            raise ValueError(f"branches is 'both', 'channel' or 'spatial', got {branches!r}")
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} must be at least 1")
        train = SecondChoice(second_policy_train, second_threshold_train, capacity_factor_train, min_capacity)
        evaluation = SecondChoice(second_policy_eval, second_threshold_eval, capacity_factor_eval, min_capacity)

        def mixture(experts: nn.Module) -> MixtureOfExperts:
            router = Top2Router(
                embed_dim, num_experts, train=train, evaluation=evaluation, balance_coef=loss_coef, seed=seed
            )
            return MixtureOfExperts(router, experts)

        self.positional_encoding = positional_encoding
        self.channel = self.spatial = None
        if branches in ("both", "channel"):
            self.channel = mixture(
                ChannelExperts(embed_dim, num_experts, num_heads=num_heads, dropout=dropout, pad_capacity=pad_capacity)
            )
        if branches in ("both", "spatial"):
            self.spatial = mixture(
                SpatialExperts(embed_dim, num_experts, num_heads=num_heads, dropout=dropout, audio_tokens=audio_tokens)
            )
        # rows: channel branch, spatial branch
        self.branch_score = nn.Linear(2 * embed_dim, 2) if branches == "both" else None

    @property
    def couples_frames(self) -> bool:
        """In training, by the balance loss."""
        return self.training

    def forward(self, mask_feature: Tensor, audio_tokens: Tensor) -> FusionOutput:
        """Mask feature (N, C, H, W) and audio tokens (N, A, C) -> fused feature (N, C, H, W), balance loss."""
        height, width = mask_feature.shape[-2:]
        tokens = mask_feature.flatten(2).transpose(1, 2)  # (N, H * W, C)
        tokens = (tokens + self.positional_encoding(height, width, tokens.device).to(tokens.dtype)).contiguous()
        outputs, balances = zip(
            *(branch(tokens, audio_tokens) for branch in (self.channel, self.spatial) if branch is not None),
            strict=True,
        )
        fused = outputs[0]
        if self.branch_score is not None:
            share = _channel_share(self.branch_score, *outputs)
            fused = torch.lerp(outputs[1], outputs[0], share.to(fused.dtype))
        feature = fused.transpose(1, 2).unflatten(2, (height, width))
        if self.residual:
            feature = mask_feature + feature
        return FusionOutput(feature, torch.stack(balances).mean())


def _channel_share(score: nn.Linear, channel: Tensor, spatial: Tensor) -> Tensor:
    """Weight (N, H * W, 1) of the channel branch: a softmax of two scores is the sigmoid of their difference."""
    of_channel, of_spatial = (score.weight[:1] - score.weight[1:]).chunk(2, dim=1)  # (1, C) each
    bias = score.bias[:1] - score.bias[1:]
    return torch.sigmoid(F.linear(channel, of_channel, bias) + F.linear(spatial, of_spatial))
