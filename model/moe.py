"""Mixture of attention experts over pixels: a top-2 router with capacity, and two kinds of experts.

The published code dispatches tokens to experts and back by dense one-hot tensors of N x n x E x capacity elements
(model/reference.py). No tensor here has a capacity axis: the router outputs the weight of each expert for each token,
(N, n, E), and both kinds of experts reduce to a few matrix products with it. This is exact, because a channel expert
has one query and outputs one channel gate for all its tokens, and a spatial expert's output depends on its token only
through the attention over audio.

Notation: N frames, n tokens per frame, E experts, C channels, h heads, d = C / h, A audio tokens.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.attention import check_heads
from model.layers.dropout import Dropout

POLICIES = ("all", "none", "threshold", "random")


class Routing(NamedTuple):
    """Output of the router.

    Attributes:
        weight: (N, n, E), weight of each expert in a token's output; at most two per token are not zero.
        kept: (N, n, E) bool, True if the token is within the expert's capacity.
        capacity: slots per expert and frame.
        balance: scalar, the balance loss.
    """

    weight: Tensor
    kept: Tensor
    capacity: int
    balance: Tensor


@dataclass(frozen=True)
class SecondChoice:
    """Policy for a token's second-best expert, and the experts' capacity.

    Attributes:
        policy: 'all' keeps the second expert, 'none' drops it, 'threshold' keeps it if its share of the two gates is
            above `threshold`, 'random' keeps it with probability min(1, share / threshold).
        threshold: see policy.
        capacity_factor: f in an expert's capacity, max(min_capacity, min(n, int(n * f / E))).
        min_capacity: see capacity_factor.

    Raises:
        ValueError: an option is out of range.
    """

    policy: str
    threshold: float
    capacity_factor: float
    min_capacity: int = 4

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"second expert policy {self.policy!r} is not one of {', '.join(POLICIES)}")
        if self.capacity_factor <= 0:
            raise ValueError(f"capacity factor {self.capacity_factor} must be positive")
        if self.min_capacity < 1:
            raise ValueError(f"min_capacity={self.min_capacity} must be at least 1")

    def capacity(self, tokens: int, experts: int) -> int:
        """Slots per expert for one frame's tokens."""
        return max(self.min_capacity, min(tokens, int(tokens * self.capacity_factor / experts)))


class Top2Router(nn.Module):
    """Routes each token to its two best experts (GShard, Lepikhin et al., 2021), in token order up to capacity.

    Args:
        embed_dim: C.
        num_experts: E.
        train: policy and capacity in training.
        evaluation: the same in evaluation; 'random' then draws from `seed`, the same for every frame and call.
        balance_coef: weight of the balance loss.
        seed: seed of the draws in evaluation.
    """

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        *,
        train: SecondChoice,
        evaluation: SecondChoice,
        balance_coef: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embed_dim, num_experts))
        self.train_choice = train
        self.evaluation_choice = evaluation
        self.balance_coef = balance_coef
        self.seed = seed
        nn.init.xavier_uniform_(self.weight)

    def forward(self, tokens: Tensor) -> Routing:
        """Route tokens (N, n, C), in float32 under autocast too: rounding the gates would change the routes."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self._route(tokens.float())

    def _route(self, tokens: Tensor) -> Routing:
        choice = self.train_choice if self.training else self.evaluation_choice
        experts = self.weight.shape[1]
        capacity = choice.capacity(tokens.shape[1], experts)

        gates = torch.softmax(tokens @ self.weight.float(), dim=-1)  # (N, n, E)
        first_gate, first = gates.max(dim=-1)  # (N, n)
        first_mask = F.one_hot(first, experts).bool()
        second_gate, second = gates.masked_fill(first_mask, 0.0).max(dim=-1)
        total = first_gate + second_gate + 1e-9
        first_share, second_share = first_gate / total, second_gate / total
        second_mask = F.one_hot(second, experts).bool() & self._keep_second(choice, second_share)[..., None]

        balance = (first_mask.float().mean(dim=1) * gates.mean(dim=1)).mean() * (experts**2 * self.balance_coef)

        first_kept = first_mask & (first_mask.cumsum(dim=1) <= capacity)
        taken = first_kept.sum(dim=1, keepdim=True)  # (N, 1, E), first choices have priority
        second_kept = second_mask & (second_mask.cumsum(dim=1) + taken <= capacity)
        weight = first_share[..., None] * first_kept + second_share[..., None] * second_kept
        return Routing(weight, weight > 0, capacity, balance)

    def _keep_second(self, choice: SecondChoice, share: Tensor) -> Tensor:
        if choice.policy == "all":
            return torch.ones_like(share, dtype=torch.bool)
        if choice.policy == "none":
            return torch.zeros_like(share, dtype=torch.bool)
        if choice.policy == "threshold":
            return share > choice.threshold
        draws = torch.rand_like(share) if self.training else counter_uniform(share.shape[1], self.seed, share.device)
        return draws < share / max(choice.threshold, 1e-9)


def counter_uniform(count: int, seed: int, device: torch.device) -> Tensor:
    """`count` uniform draws in [0, 1), float32, each a function of `seed` and its index.

    A counter-based generator (two rounds of the 32-bit finaliser of MurmurHash3, Appleby, 2011): the same numbers on
    every device and under every compiler, independent of the order of calls.
    """
    bits = torch.arange(count, dtype=torch.int64, device=device) + (seed * 0x9E3779B9 & 0x7FFFFFFF)
    for _ in range(2):
        bits = (bits ^ (bits >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
        bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
        bits = bits ^ (bits >> 16)
    return (bits >> 8).float() * 2.0**-24


class ChannelExperts(nn.Module):
    """Channel experts: the audio attends to the expert's tokens, and the result gates their channels.

    With one query per expert, keys and values need not be computed per token: the key matrix is folded into the query,
    so that the scores of all tokens are one product, and the value matrix is applied to the attended mean of the
    tokens.

    Args:
        embed_dim: C.
        num_experts: E.
        num_heads: h.
        dropout: dropout rate of the gates, before the sigmoid.
        pad_capacity: include an expert's empty slots in its softmax as zero keys and values, as published.
    """

    def __init__(
        self, embed_dim: int, num_experts: int, *, num_heads: int = 8, dropout: float = 0.4, pad_capacity: bool = True
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        self.num_heads = num_heads
        self.pad_capacity = pad_capacity
        self.query_weight = nn.Parameter(torch.empty(num_experts, embed_dim, embed_dim))
        self.key_value_weight = nn.Parameter(torch.empty(num_experts, 2 * embed_dim, embed_dim))
        self.out_weight = nn.Parameter(torch.empty(num_experts, embed_dim, embed_dim))
        self.out_bias = nn.Parameter(torch.empty(num_experts, embed_dim))
        self.dropout = Dropout(dropout)
        bound = 1 / math.sqrt(embed_dim)
        nn.init.uniform_(self.out_bias, -bound, bound)

    def forward(self, tokens: Tensor, audio_tokens: Tensor, routing: Routing) -> Tensor:
        """Tokens (N, n, C), audio tokens (N, A, C) and their routing -> output (N, n, C)."""
        audio = audio_tokens.mean(dim=1)  # (N, C)
        channels = tokens.shape[2]
        experts, heads = self.query_weight.shape[0], self.num_heads
        key_weight, value_weight = self.key_value_weight.chunk(2, dim=1)  # (E, C, C)

        query = torch.einsum("nc,edc->ned", audio, self.query_weight).unflatten(-1, (heads, -1))  # (N, E, h, d)
        folded = torch.einsum("nehd,ehdc->nehc", query, key_weight.unflatten(1, (heads, -1)))
        if torch.compiler.is_exporting():  # strides that depend on N would exclude N = 1 from the export
            folded = folded.contiguous()
        folded = folded.flatten(1, 2) * (channels // heads) ** -0.5  # (N, E * h, C)
        scores = (folded @ tokens.transpose(1, 2)).unflatten(1, (experts, heads))  # (N, E, h, n)
        attention = self._softmax_over_slots(scores, routing).flatten(1, 2)  # (N, E * h, n)
        attended = (attention.to(tokens.dtype) @ tokens).unflatten(1, (experts, heads))  # (N, E, h, C)

        value = torch.einsum("nehc,ehdc->nehd", attended, value_weight.unflatten(1, (heads, -1))).flatten(
            2
        )  # (N, E, C)
        gate = torch.sigmoid(self.dropout(torch.einsum("nec,edc->ned", value, self.out_weight) + self.out_bias))
        return tokens * (routing.weight.to(gate.dtype) @ gate).to(tokens.dtype)

    def _softmax_over_slots(self, scores: Tensor, routing: Routing) -> Tensor:
        """Softmax over the tokens that an expert keeps, and over its empty slots with score 0."""
        kept = routing.kept.transpose(1, 2)[:, :, None].contiguous()  # (N, E, 1, n)
        scores = scores.float() + torch.where(kept, 0.0, -torch.inf)
        peak = scores.amax(dim=-1, keepdim=True).clamp(min=0.0).detach()
        weight = torch.exp(scores - peak)
        total = weight.sum(dim=-1, keepdim=True)
        if self.pad_capacity:
            empty = routing.capacity - kept.sum(dim=-1, keepdim=True)
            total = total + empty * torch.exp(-peak)
        return weight / total.clamp(min=torch.finfo(total.dtype).tiny)


class SpatialExperts(nn.Module):
    """Spatial experts: each token attends to the audio.

    Args:
        embed_dim: C.
        num_experts: E.
        num_heads: h.
        dropout: dropout rate of the attention weights.
        audio_tokens: 'mean', as published: the mean of the audio tokens is the only key, so an expert's output is the
            same vector for every token and is computed once. 'all': attend to all audio tokens, as in the paper's
            figure.
    """

    def __init__(
        self,
        embed_dim: int,
        num_experts: int,
        *,
        num_heads: int = 8,
        dropout: float = 0.4,
        audio_tokens: str = "mean",
    ) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        if audio_tokens not in ("mean", "all"):
            raise ValueError(f"audio_tokens is 'mean' or 'all', got {audio_tokens!r}")
        self.num_heads = num_heads
        self.dropout = Dropout(dropout)
        self.audio_tokens = audio_tokens
        self.in_weight = nn.Parameter(torch.empty(num_experts, 3 * embed_dim, embed_dim))
        self.out_weight = nn.Parameter(torch.empty(num_experts, embed_dim, embed_dim))

    def forward(self, tokens: Tensor, audio_tokens: Tensor, routing: Routing) -> Tensor:
        """Tokens (N, n, C), audio tokens (N, A, C) and their routing -> output (N, n, C)."""
        heads = self.num_heads
        query_weight, key_weight, value_weight = self.in_weight.chunk(3, dim=1)  # (E, C, C)
        if self.audio_tokens == "mean":
            audio_tokens = audio_tokens.mean(dim=1, keepdim=True)
        value = torch.einsum("nac,edc->nead", audio_tokens, value_weight).unflatten(-1, (heads, -1))  # (N, E, A, h, d)
        out_weight = self.out_weight.unflatten(-1, (heads, -1))  # (E, C, h, d)
        projected = torch.einsum("neahd,echd->neahc", value, out_weight)  # (N, E, A, h, C)

        if self.audio_tokens == "mean" and not (self.training and self.dropout.p):
            return (routing.weight.to(projected.dtype) @ projected.sum(dim=(2, 3))).to(tokens.dtype)
        if self.audio_tokens == "mean":
            attention = tokens.new_ones(*tokens.shape[:2], self.in_weight.shape[0], 1, heads)  # softmax of one key
        else:
            attention = self._attention(tokens, audio_tokens, query_weight, key_weight)
        attention = self.dropout(attention)  # (N, n, E, A, h)
        weighted = routing.weight[..., None, None].to(attention.dtype) * attention
        return (weighted.flatten(2) @ projected.flatten(1, 3)).to(tokens.dtype)

    def _attention(self, tokens: Tensor, audio_tokens: Tensor, query_weight: Tensor, key_weight: Tensor) -> Tensor:
        """Attention weights (N, n, E, A, h), with the query matrix folded into the keys."""
        heads, channels = self.num_heads, tokens.shape[-1]
        key = torch.einsum("nac,edc->nead", audio_tokens, key_weight).unflatten(-1, (heads, -1))
        folded = torch.einsum("neahd,ehdc->neahc", key, query_weight.unflatten(1, (heads, -1)))
        scores = tokens @ (folded.flatten(1, 3) * (channels // heads) ** -0.5).transpose(1, 2)
        return scores.unflatten(-1, (key.shape[1], key.shape[2], heads)).float().softmax(dim=3).to(tokens.dtype)


class MixtureOfExperts(nn.Module):
    """A router and its experts.

    Args:
        router: weights of the experts for each token.
        experts: ChannelExperts or SpatialExperts.
    """

    def __init__(self, router: Top2Router, experts: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.experts = experts

    def forward(self, tokens: Tensor, audio_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, n, C) and audio tokens (N, A, C) -> output (N, n, C), balance loss (scalar)."""
        routing = self.router(tokens)
        return self.experts(tokens, audio_tokens, routing), routing.balance
