"""Owns the strided and the fixed pattern of the Sparse Transformer (1904.10509), two-sided."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from attention.base import Attention, Description, HeadShape
from attention.sparse.blocks import KeySet, attend, gathered, hidden_blocks, join_blocks, split_blocks, window

Heads = Literal["merged", "split"]


class _TwoSets(Attention):
    """A near and a far set of keys. `merged`: every head attends to their union. `split`: even heads attend to the near
    set and odd heads to the far one. The paper is causal; an encoder attends to both sides."""

    exemptions: Mapping[str, str] = {"U5": "the neighbourhood is a pattern of positions"}

    def __init__(self, shape: HeadShape, stride: int, heads: Heads) -> None:
        super().__init__()
        if heads not in ("merged", "split"):
            raise ValueError(f"unknown sparse transformer heads={heads!r}; choose merged or split")
        if stride < 1:
            raise ValueError(f"sparse transformer needs stride >= 1, got {stride}")
        if heads == "split" and shape.num_heads < 2:
            raise ValueError("sparse transformer heads=split needs at least 2 heads; use merged")
        self.stride, self.heads = stride, heads

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        hidden = hidden_blocks(k, key_padding_mask, self.stride)  # [B, N, l]
        blocks = [split_blocks(x, self.stride) for x in (q / math.sqrt(q.shape[-1]), k, v)]
        if self.heads == "merged":
            out = attend([self.near(*blocks, hidden), self.far(*blocks, hidden, without_near=True)])
        else:
            out = torch.empty_like(blocks[2])
            out[:, ::2] = attend([self.near(*(x[:, ::2] for x in blocks), hidden)])
            out[:, 1::2] = attend([self.far(*(x[:, 1::2] for x in blocks), hidden, without_near=False)])
        return join_blocks(out, q.shape[2])

    @abstractmethod
    def near(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> KeySet:
        """q (scaled), k, v [B, H, N, l, D], hidden [B, N, l]."""

    @abstractmethod
    def far(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, without_near: bool) -> KeySet:
        """As `near`; `without_near` leaves out the keys that the near set has already."""


class Strided(_TwoSets):
    """Near: |i - j| < l. Far: (i - j) mod l = 0."""

    description = Description(paper="1904.10509", exact=True, complexity="L l D + L^2 D / l")

    def __init__(self, shape: HeadShape, generator: torch.Generator, *, stride: int, heads: Heads) -> None:
        super().__init__(shape, stride, heads)

    def near(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> KeySet:
        return window(q, k, v, hidden, reach=1, within=self.stride)

    def far(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, without_near: bool) -> KeySet:
        # position r of every block is one comb, on which attention is dense
        logits = torch.einsum("bhnrd,bhmrd->bhnrm", q, k)
        hidden = hidden.transpose(1, 2)[:, None, None]  # [B, 1, 1, l, M]
        if without_near:  # of a comb only the query's own position is near
            own = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)[:, None]  # [N, 1, M]
            hidden = hidden | own
        return KeySet(logits, hidden, lambda weights: torch.einsum("bhnrm,bhmrd->bhnrd", weights, v))


class Fixed(_TwoSets):
    """Near: floor(i / l) = floor(j / l). Far: the summary positions, j mod l >= l - c."""

    description = Description(paper="1904.10509", exact=True, complexity="L l D + L^2 D c / l")

    def __init__(
        self, shape: HeadShape, generator: torch.Generator, *, stride: int, num_summary: int, heads: Heads
    ) -> None:
        super().__init__(shape, stride, heads)
        if not 1 <= num_summary <= stride:
            raise ValueError(f"sparse transformer needs 1 <= num_summary <= stride={stride}, got {num_summary}")
        self.num_summary = num_summary
        if heads == "split":
            self.exemptions = {**self.exemptions, "U3": "odd heads give 0 while no summary position is real"}

    def near(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> KeySet:
        return window(q, k, v, hidden, reach=0)

    def far(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, without_near: bool) -> KeySet:
        count, first = q.shape[2], self.stride - self.num_summary
        keys, values = (x[:, :, :, first:].flatten(2, 3)[:, :, None] for x in (k, v))  # [B, H, 1, N c, D]
        hidden = hidden[:, :, first:].flatten(1)[:, None, None, None]  # [B, 1, 1, 1, N c]
        if without_near:
            own = torch.eye(count, dtype=torch.bool, device=q.device).repeat_interleave(self.num_summary, dim=1)
            hidden = hidden | own[:, None]  # [B, 1, N, 1, N c]
        return gathered(q, keys, values, hidden)
