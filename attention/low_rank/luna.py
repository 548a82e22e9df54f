"""Owns Luna's pack-and-unpack attention over a learned sequence.

Legend: B batch, H heads, L length, D head_dim, l packed_len.
"""

import torch
from torch import Tensor, nn

from attention.base import Attention, Description, HeadShape
from attention.low_rank.real_keys import masked_softmax


class Luna(Attention):
    """Pack W = softmax(P K^T / sqrt(D)), K_P = W K, V_P = W V; unpack softmax(q K_P^T / sqrt(D)) V_P (2106.01540).

    P [H, l, D] is learned. Adapted to q, k and v: the original has its own projections for the two stages and ties
    keys and values. It also hands the packed sequence on to the next layer; a carry between layers lies outside the
    slot, so here every layer starts from its own P (an induced-set attention, 1810.00825).
    """

    description = Description(paper="2106.01540", exact=False, complexity="L l D")

    def __init__(self, shape: HeadShape, generator: torch.Generator, *, packed_len: int, init_std: float) -> None:
        """`packed_len`: l. `init_std`: P starts as N(0, init_std^2)."""
        super().__init__()
        size = (shape.num_heads, packed_len, shape.head_dim)
        self.packed = nn.Parameter(init_std * torch.randn(size, generator=generator))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        keys, values = self.pack(k, v, key_padding_mask)
        return unpack(q, keys, values)

    def pack(self, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """K_P, V_P [B, H, l, D]."""
        logits = self.packed @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # [B, H, l, L]
        weights = masked_softmax(logits, key_padding_mask)
        return weights @ k, weights @ v


def unpack(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention of q [B, H, L, D] over the packed keys and values [B, H, l, D]."""
    logits = q @ keys.transpose(-2, -1) * q.shape[-1] ** -0.5  # [B, H, L, l]
    return logits.softmax(dim=-1) @ values
