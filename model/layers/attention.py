"""Multi-head attention over scaled_dot_product_attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.dropout import Dropout
from model.layers.recompute import recompute


class MultiheadAttention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017) by the fused kernel, without materialised attention weights.

    Parameters have the names and layout of `torch.nn.MultiheadAttention`; tensors are batch first. Only training with
    dropout on a CPU materialises the attention weights, and recomputes them in the backward pass.

    Args:
        embed_dim: C.
        num_heads: attention heads, a divisor of C.
        bias: whether the four projections have biases.
        dropout: dropout rate of the attention weights.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(embed_dim, num_heads)
        self.num_heads = num_heads
        self.dropout = Dropout(dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, memory: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """Attend from each query to the memory.

        Args:
            query: (N, Q, C).
            memory: keys and values (N, L, C); None for self-attention.
            key_mask: (N, L) bool, False for keys to ignore.

        Returns:
            (N, Q, C).
        """
        channels = query.shape[-1]
        if memory is None:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            query_bias, memory_bias = (
                (None, None)
                if self.in_proj_bias is None
                else (self.in_proj_bias[:channels], self.in_proj_bias[channels:])
            )
            q = F.linear(query, self.in_proj_weight[:channels], query_bias)
            k, v = F.linear(memory, self.in_proj_weight[channels:], memory_bias).chunk(2, dim=-1)
        mask = None if key_mask is None else key_mask[:, None, None, :]
        attended = self._attend(self._heads(q), self._heads(k), self._heads(v), mask)  # (N, heads, Q, C / heads)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rate = self.dropout.p if self.training else 0.0
        if rate and query.device.type == "cpu" and not torch.compiler.is_compiling():
            return recompute(self._attend_with_weights, query, key, value, mask)
        return F.scaled_dot_product_attention(query, key, value, mask, rate)

    def _attend_with_weights(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        # On a CPU the fused kernel has no dropout, and PyTorch's fallback draws its masks slowly.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return self.dropout(scores.softmax(dim=-1)) @ value

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def check_heads(embed_dim: int, num_heads: int) -> None:
    """Raise ValueError unless C is a multiple of the number of heads."""
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim={embed_dim} is not a multiple of num_heads={num_heads}")
