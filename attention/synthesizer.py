"""Owns Synthesizer attention (2005.00743): logits that are synthesised without comparing queries with keys."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attention.base import Attention, Description, HeadShape
from attention.sparse.blocks import check_length, masked_softmax


class Synthesizer(Attention):
    """out = softmax(sum of the parts' logits [+ q.k / sqrt(D)])[:, :L] V, masked keys left out."""

    description = Description(paper="2005.00743", exact=True, complexity="L^2 D")
    exemptions = {"U5": "the logits of a key belong to its position, not to its content"}

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        parts: Sequence[Callable[[HeadShape, torch.Generator], nn.Module]],
        dot_product: bool,
    ) -> None:
        """`parts`: the logits to add (Dense, Random, Factorized); `dot_product`: the paper's mixture with attention."""
        super().__init__()
        if not parts:
            raise ValueError("a synthesizer needs at least one of the parts Dense, Random, Factorized")
        self.max_len, self.dot_product = shape.max_len, dot_product
        self.parts = nn.ModuleList(part(shape, generator) for part in parts)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        check_length(q.shape[2], self.max_len, "synthesizer")
        logits = sum((part(q) for part in self.parts[1:]), start=self.parts[0](q))  # [B or 1, H, L, L]
        if self.dot_product:
            logits = logits + q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if key_padding_mask is None:
            return logits.softmax(dim=-1) @ v
        return masked_softmax(logits, key_padding_mask[:, None, None, :]) @ v


class Dense(nn.Module):
    """S_i = W2 relu(W1 q_i + b1) + b2: each query writes its row of logits, one entry per position; W1, W2 per head."""

    def __init__(self, shape: HeadShape, generator: torch.Generator) -> None:
        super().__init__()
        heads, width = shape.num_heads, shape.head_dim
        self.weight1 = nn.Parameter(torch.empty(heads, width, width))
        self.bias1 = nn.Parameter(torch.empty(heads, 1, width))
        self.weight2 = nn.Parameter(torch.empty(heads, width, shape.max_len))
        self.bias2 = nn.Parameter(torch.empty(heads, 1, shape.max_len))
        for parameter in self.parameters():  # nn.Linear's law
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)

    def forward(self, q: Tensor) -> Tensor:
        """q [B, H, L, D] -> logits [B, H, L, L]."""
        length = q.shape[2]
        hidden = (q @ self.weight1 + self.bias1).relu()
        return hidden @ self.weight2[:, :, :length] + self.bias2[:, :, :length]


class Random(nn.Module):
    """S = R, a learned matrix [H, max_len, max_len] that sees no input; initialised by Glorot's uniform law."""

    def __init__(self, shape: HeadShape, generator: torch.Generator) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(shape.num_heads, shape.max_len, shape.max_len))
        bound = math.sqrt(3 / shape.max_len)
        nn.init.uniform_(self.logits, -bound, bound, generator=generator)

    def forward(self, q: Tensor) -> Tensor:
        """Only the length of q [B, H, L, D] matters -> logits [1, H, L, L]."""
        length = q.shape[2]
        return self.logits[None, :, :length, :length]


class Factorized(nn.Module):
    """S = R1 R2^T with learned R1, R2 [H, max_len, rank]; initialised by Glorot's uniform law."""

    def __init__(self, shape: HeadShape, generator: torch.Generator, *, rank: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(shape.num_heads, shape.max_len, rank))
        self.columns = nn.Parameter(torch.empty(shape.num_heads, shape.max_len, rank))
        bound = math.sqrt(6 / (shape.max_len + rank))
        for parameter in (self.rows, self.columns):
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, q: Tensor) -> Tensor:
        """Only the length of q [B, H, L, D] matters -> logits [1, H, L, L]."""
        length = q.shape[2]
        return (self.rows[:, :length] @ self.columns[:, :length].transpose(-2, -1))[None]
