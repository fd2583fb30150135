"""The published formulation of MoDAT: definition and baseline of what the model computes in another way.

`dense_published(model)` returns a second model with the same parameters and the same results, in which
 - tokens are dispatched to experts and back by dense one-hot tensors (N, n, E, capacity), and experts run one by one on
   all their slots;
 - deformable attention is softmax, location arithmetic and grid_sample, step by step;
 - multi-head attention materialises its weights (`need_weights=True`), also in the image backbone;
 - all Q equal queries are decoded;
 - training stores the activations and dropout masks of feed-forward blocks;
 - similarities with the queries are materialised before the mask MLP;
 - positional encodings and reference points are computed in each call.
Losses, optimizer and everything else are shared, so ratios between the two understate the cost of the published
scripts.

Notation: N frames, n tokens per frame, E experts, C channels, Q queries.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.fusion import CrossModalMixer, DualAttentionMoE, FusionOutput
from model.layers.attention import MultiheadAttention
from model.layers.dropout import Dropout
from model.layers.position import SinePositionalEncoding, SpatialShapes
from model.mask_head import MaskPredictor
from model.moe import ChannelExperts, MixtureOfExperts, SecondChoice, SpatialExperts, Top2Router, counter_uniform
from model.query_generators import EncoderDecoderGenerator, GeneratedQueries
from model.transformer import Encoder, FeedForward
from ops import MSDeformAttn
from ops.reference import ms_deform_attn_torch, sampling_locations


def dense_published(model: nn.Module) -> nn.Module:
    """A copy of the model in the published formulation, sharing its parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    dense = copy.deepcopy(model, shared)
    for module in dense.modules():
        if hasattr(module, "fused_attn"):  # timm's attention; unknown to mypy
            setattr(module, "fused_attn", False)  # noqa: B010
    return _replaced(dense)


def _replaced(module: nn.Module) -> nn.Module:
    """The module's dense form, its children replaced first."""
    for name, child in module.named_children():
        setattr(module, name, _replaced(child))
    for original, dense in _DENSE.items():
        if type(module) is original:
            return dense(module).train(module.training)
    return module


class DenseAttention(nn.Module):
    """MultiheadAttention by PyTorch's multi_head_attention_forward, which materialises the weights."""

    original: MultiheadAttention

    def __init__(self, original: MultiheadAttention) -> None:
        super().__init__()
        self.original = original

    def forward(self, query: Tensor, memory: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """As the original."""
        memory = query if memory is None else memory
        o = self.original
        return attention_with_weights(
            query,
            memory,
            o.num_heads,
            o.in_proj_weight,
            o.in_proj_bias,
            o.out_proj.weight,
            o.out_proj.bias,
            dropout=o.dropout.p if self.training else 0.0,
            key_mask=key_mask,
        )


def attention_with_weights(
    query: Tensor,
    memory: Tensor,
    num_heads: int,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    dropout: float = 0.0,
    key_mask: Tensor | None = None,
) -> Tensor:
    """nn.MultiheadAttention with its defaults, sequence first: query (N, Q, C), memory (N, L, C) -> (N, Q, C)."""
    query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    out, _ = F.multi_head_attention_forward(
        query,
        memory,
        memory,
        query.shape[-1],
        num_heads,
        in_weight,
        in_bias,
        None,
        None,
        False,
        dropout,
        out_weight,
        out_bias,
        training=dropout > 0,
        key_padding_mask=None if key_mask is None else ~key_mask,
        need_weights=True,
    )
    return out.transpose(0, 1)


class DenseDeformableAttention(nn.Module):
    """MSDeformAttn with softmax, locations and sampling as separate steps on whole tensors."""

    original: MSDeformAttn

    def __init__(self, original: MSDeformAttn) -> None:
        super().__init__()
        self.original = original

    def forward(self, query: Tensor, points: Tensor, memory: Tensor, shapes: SpatialShapes) -> Tensor:
        """As the original, for reference points (Q, 2)."""
        o = self.original
        samples = (o.num_heads, o.num_levels, o.num_points)
        value = o.value_proj(memory).unflatten(-1, (o.num_heads, -1))
        offsets = o.sampling_offsets(query).unflatten(-1, (*samples, 2))
        weights = o.attention_weights(query).unflatten(-1, (o.num_heads, -1)).softmax(-1).unflatten(-1, samples[1:])
        locations = sampling_locations(points[None, :, None].to(offsets.dtype), offsets, shapes)
        return o.output_proj(ms_deform_attn_torch(value, shapes, locations, weights))


class FreshPosition(nn.Module):
    """SinePositionalEncoding computed in each call, for every pixel separately."""

    original: SinePositionalEncoding

    def __init__(self, original: SinePositionalEncoding) -> None:
        super().__init__()
        if original.normalize:
            raise ValueError("the dense reference supports positions in pixels only, not normalize=True")
        self.original = original

    def forward(self, height: int, width: int, device: torch.device) -> Tensor:
        """As the original."""
        ones = torch.ones(1, height, width, device=device)
        axes = ones.cumsum(1), ones.cumsum(2)  # row and column from 1
        feature = torch.arange(self.original.num_feats, dtype=torch.float32, device=device)
        wave = self.original.temperature ** (2 * feature.div(2, rounding_mode="floor") / self.original.num_feats)
        encoded = []
        for axis in axes:
            angle = axis[..., None] / wave  # (1, H, W, F)
            encoded.append(torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=4).flatten(3))
        return torch.cat(encoded, dim=3).flatten(0, 2)


def fresh_reference_points(shapes: SpatialShapes, device: torch.device) -> Tensor:
    """Pixel centres of all levels, (L, 2), x then y, by meshgrid."""
    levels = []
    for height, width in shapes:
        y, x = torch.meshgrid(
            torch.linspace(0.5, height - 0.5, height, device=device) / height,
            torch.linspace(0.5, width - 0.5, width, device=device) / width,
            indexing="ij",
        )
        levels.append(torch.stack((x.flatten(), y.flatten()), -1))
    return torch.cat(levels)


def library_dropout(original: Dropout) -> nn.Dropout:
    """PyTorch's dropout, which draws element by element on a CPU and stores the mask."""
    return nn.Dropout(original.p)


class DenseFeedForward(nn.Module):
    """FeedForward that stores its hidden activations for the backward pass."""

    original: FeedForward

    def __init__(self, original: FeedForward) -> None:
        super().__init__()
        self.original = original

    def forward(self, x: Tensor) -> Tensor:
        """As the original."""
        o = self.original
        hidden = o.dropout(F.gelu(o.linear1(x)))
        out: Tensor = o.norm(x + o.dropout(o.linear2(hidden)))
        return out


class DenseEncoder(nn.Module):
    """Encoder with reference points computed in each call."""

    original: Encoder

    def __init__(self, original: Encoder) -> None:
        super().__init__()
        self.original = original

    def forward(self, tokens: Tensor, position: Tensor, shapes: SpatialShapes) -> Tensor:
        """As the original."""
        points = fresh_reference_points(shapes, tokens.device)
        for layer in self.original.layers:
            tokens = layer(tokens, position, points, shapes)
        return tokens


class DenseQueryGenerator(nn.Module):
    """EncoderDecoderGenerator that decodes all Q (equal) queries."""

    original: EncoderDecoderGenerator

    def __init__(self, original: EncoderDecoderGenerator) -> None:
        super().__init__()
        self.original = original

    def forward(self, audio: Tensor, features: Sequence[Tensor], frame_mask: Tensor | None = None) -> GeneratedQueries:
        """As the original."""
        o = self.original
        audio_tokens = audio if o.av_fusion is None else o.av_fusion(audio, features, frame_mask)
        queries = audio.repeat(1, o.num_queries, 1) if o.query is None else audio + o.query.weight
        outputs = []
        for layer in o.decoder:
            queries = layer(queries, audio_tokens)
            outputs.append(queries)
        return GeneratedQueries(o.layer_mix(torch.stack(outputs, dim=-1)).squeeze(-1), audio_tokens)


class DenseMaskPredictor(nn.Module):
    """MaskPredictor with materialised similarities (N, Q, H, W) and its MLP as 1x1 convolutions."""

    original: MaskPredictor

    def __init__(self, original: MaskPredictor) -> None:
        super().__init__()
        self.original = original

    def forward(self, queries: Tensor, mask_feature: Tensor) -> Tensor:
        """As the original."""
        o = self.original
        hidden = torch.einsum("nqc,nchw->nqhw", queries, mask_feature)
        for number, module in enumerate(o.layers):
            layer = cast(nn.Linear, module)
            hidden = F.conv2d(hidden, layer.weight[..., None, None], layer.bias)
            if number + 1 < len(o.layers):
                hidden = F.relu(hidden)
        fine = F.interpolate(o.reduce(hidden + mask_feature), scale_factor=float(o.scale_factor), mode="bilinear")
        return o.classify(F.relu(o.refine(fine)))


class EagerMixer(nn.Module):
    """AVSegFormer's CrossModalMixer with materialised attention weights."""

    original: CrossModalMixer

    def __init__(self, original: CrossModalMixer) -> None:
        super().__init__()
        self.original = original

    def forward(self, mask_feature: Tensor, audio_tokens: Tensor) -> FusionOutput:
        """As the original."""
        o = self.original
        tokens = mask_feature.flatten(2).transpose(1, 2)
        query = o.q_proj(audio_tokens.mean(dim=1, keepdim=True))
        attended = _eager_attention(query, o.kv_proj(tokens), o.num_heads)
        gate = torch.sigmoid(o.dropout(o.proj(attended)))  # (N, 1, C)
        return FusionOutput(mask_feature * gate.transpose(1, 2)[..., None], mask_feature.new_zeros(()))


def _eager_attention(query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
    """Query (N, 1, C), keys and values (N, L, 2 C) -> (N, 1, C)."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, *key_value.chunk(2, dim=-1)))
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)  # (N, h, 1, L)
    return (weights @ v).transpose(1, 2).flatten(2)


def dense_routing(router: Top2Router, tokens: Tensor, *, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Top-2 routing of tokens (N, n, C) as one-hot tensors.

    Returns:
        dispatch (N, n, E, capacity) of 0 and 1, combine of the same shape with the gates, balance loss (scalar).
    """
    choice = router.train_choice if training else router.evaluation_choice
    experts, n = router.weight.shape[1], tokens.shape[1]
    capacity = max(choice.min_capacity, min(n, int(n * choice.capacity_factor / experts)))
    gates = (tokens.float() @ router.weight.float()).softmax(-1)  # (N, n, E)

    index_1 = gates.argmax(-1)
    mask_1 = F.one_hot(index_1, experts).float()
    gate_1 = (gates * mask_1).sum(-1)
    others = gates * (1 - mask_1)
    index_2 = others.argmax(-1)
    mask_2 = F.one_hot(index_2, experts).float()
    gate_2 = (others * mask_2).sum(-1)
    total = gate_1 + gate_2 + 1e-9
    gate_1, gate_2 = gate_1 / total, gate_2 / total
    balance = (mask_1.mean(1) * gates.mean(1)).mean() * float(experts**2) * router.balance_coef
    mask_2 = mask_2 * _second_kept(choice, gate_2, router.seed, training)[..., None]

    slot_1 = (mask_1.cumsum(1) - mask_1) * mask_1  # (N, n, E), tokens before this one
    mask_1 = mask_1 * (slot_1 < capacity)
    slot_2 = (mask_2.cumsum(1) - mask_2 + mask_1.sum(1, keepdim=True)) * mask_2
    mask_2 = mask_2 * (slot_2 < capacity)

    combine = torch.zeros((), device=tokens.device)
    for gate, index, mask, slot in ((gate_1, index_1, mask_1, slot_1), (gate_2, index_2, mask_2, slot_2)):
        kept = mask.sum(-1)  # (N, n)
        position = ((slot * mask).sum(-1) * kept).long()
        combine = combine + (
            (gate * kept)[..., None, None]
            * F.one_hot(index, experts)[..., None]
            * F.one_hot(position, capacity)[..., None, :]
        )
    return combine.bool().to(tokens.dtype), combine.to(tokens.dtype), balance


def _second_kept(choice: SecondChoice, share: Tensor, seed: int, training: bool) -> Tensor:
    """Second choices (N, n) that the policy keeps, as floats."""
    if choice.policy == "all":
        return torch.ones_like(share)
    if choice.policy == "none":
        return torch.zeros_like(share)
    if choice.policy == "threshold":
        return (share > choice.threshold).float()
    draws = torch.rand_like(share) if training else counter_uniform(share.shape[1], seed, share.device)
    return (draws < share / max(choice.threshold, 1e-9)).float()


class DenseMixture(nn.Module):
    """MixtureOfExperts by dense dispatch: the experts run one after another on all their slots, filled or empty."""

    router: Top2Router
    experts: ChannelExperts | SpatialExperts

    def __init__(self, original: MixtureOfExperts) -> None:
        super().__init__()
        self.router = original.router
        self.experts = cast(ChannelExperts | SpatialExperts, original.experts)
        if isinstance(self.experts, ChannelExperts) and not self.experts.pad_capacity:
            raise ValueError("the dense reference pads experts with empty slots; pad_capacity=False is not supported")

    def forward(self, tokens: Tensor, audio_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As the original."""
        dispatch, combine, balance = dense_routing(self.router, tokens, training=self.training)
        slots = torch.einsum("nkc,nkep->enpc", tokens, dispatch)  # (E, N, capacity, C)
        audio = audio_tokens.mean(dim=1, keepdim=True)
        if isinstance(self.experts, SpatialExperts) and self.experts.audio_tokens == "all":
            audio = audio_tokens
        if isinstance(self.experts, ChannelExperts):
            outputs = _channel_outputs(self.experts, slots, audio)
        else:
            outputs = _spatial_outputs(self.experts, slots, audio)
        return torch.einsum("enpc,nkep->nkc", torch.stack(outputs), combine), balance


def _channel_outputs(experts: ChannelExperts, slots: Tensor, audio: Tensor) -> list[Tensor]:
    """Each expert's slots (E, N, capacity, C) times its gates, with q, k and v of every slot."""
    # The gradient of unbind is one stack; indexing would allocate a stack of zeros per expert.
    weights = (experts.query_weight, experts.key_value_weight, experts.out_weight, experts.out_bias)
    outputs = []
    for tokens, query, key_value, out, bias in zip(slots, *(weight.unbind(0) for weight in weights), strict=True):
        attended = _eager_attention(F.linear(audio, query), F.linear(tokens, key_value), experts.num_heads)
        outputs.append(tokens * torch.sigmoid(experts.dropout(F.linear(attended, out, bias))))
    return outputs


def _spatial_outputs(experts: SpatialExperts, slots: Tensor, audio: Tensor) -> list[Tensor]:
    """Each expert's attention from its slots (E, N, capacity, C) to the audio, as published a softmax of one key."""
    dropout = experts.dropout.p if experts.training else 0.0
    weights = zip(slots, experts.in_weight.unbind(0), experts.out_weight.unbind(0), strict=True)
    return [
        attention_with_weights(tokens, audio, experts.num_heads, w_in, None, w_out, None, dropout=dropout)
        for tokens, w_in, w_out in weights
    ]


class DenseDualAttentionMoE(nn.Module):
    """DualAttentionMoE of DenseMixtures, with the branches weighted by two convolutions and a softmax."""

    def __init__(self, original: DualAttentionMoE) -> None:
        super().__init__()
        self.positional_encoding = original.positional_encoding
        self.channel, self.spatial = original.channel, original.spatial
        self.branch_score = original.branch_score

    def forward(self, mask_feature: Tensor, audio_tokens: Tensor) -> FusionOutput:
        """As the original."""
        height, width = mask_feature.shape[-2:]
        position = self.positional_encoding(height, width, mask_feature.device).to(mask_feature.dtype)
        tokens = mask_feature.flatten(2).transpose(1, 2) + position
        outputs, losses = zip(
            *(branch(tokens, audio_tokens) for branch in (self.channel, self.spatial) if branch is not None),
            strict=True,
        )
        maps = [output.transpose(1, 2).unflatten(2, (height, width)) for output in outputs]
        fused = maps[0]
        if self.branch_score is not None:
            both = torch.cat(maps, dim=1)  # (N, 2 C, H, W)
            weight, bias = self.branch_score.weight, self.branch_score.bias
            scores = torch.cat([F.conv2d(both, weight[i : i + 1, :, None, None], bias[i : i + 1]) for i in (0, 1)], 1)
            share = scores.softmax(1)
            fused = share[:, :1] * maps[0] + share[:, 1:] * maps[1]
        return FusionOutput(fused, sum(losses) / len(losses))


_DENSE: dict[type[nn.Module], Callable[..., nn.Module]] = {
    Dropout: library_dropout,
    FeedForward: DenseFeedForward,
    MultiheadAttention: DenseAttention,
    MSDeformAttn: DenseDeformableAttention,
    SinePositionalEncoding: FreshPosition,
    Encoder: DenseEncoder,
    EncoderDecoderGenerator: DenseQueryGenerator,
    MaskPredictor: DenseMaskPredictor,
    CrossModalMixer: EagerMixer,
    MixtureOfExperts: DenseMixture,
    DualAttentionMoE: DenseDualAttentionMoE,
}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64."""
    found, expected = found.double(), expected.double()
    scale = float(expected.norm())
    difference = float((found - expected).norm())
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)
