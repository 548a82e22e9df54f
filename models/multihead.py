"""Owns the q/k/v/o projections round the attention slot, and the one precision island of the model.

Legend: B batch, H heads, L length, D head_dim.
"""

import torch
from torch import Tensor, nn

from attention.base import Attention


class MultiHeadAttention(nn.Module):
    """[B, L, dim] -> [B, L, dim]: project to q, k, v, split into heads, mix with the slot, join, project."""

    def __init__(self, attention: Attention, *, dim: int, num_heads: int, full_precision: bool) -> None:
        """`full_precision`: run the slot in float32 with autocast off, for every mechanism alike."""
        super().__init__()
        self.num_heads, self.full_precision = num_heads, full_precision
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.attention = attention
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        q, k, v = (self._split(project(x)) for project in (self.query, self.key, self.value))
        with torch.autocast(device_type=x.device.type, enabled=False):  # each mechanism decides nothing about precision
            if self.full_precision:
                q, k, v = q.float(), k.float(), v.float()
            mixed = self.attention(q, k, v, key_padding_mask)  # [B, H, L, D]
        return self.out(mixed.transpose(1, 2).flatten(2).to(x.dtype))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, L, D]
