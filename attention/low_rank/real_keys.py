"""Owns what low-rank mechanisms do with padding: softmax rows over real keys, and addresses of real positions.

Legend: B batch, H heads, L length, N real positions of an example.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_DRAW_BITS = 31  # a draw is an integer in [0, 2^31): exact under any cast of the model, unlike a uniform float


def masked_softmax(logits: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Softmax over the last axis of [B, H, R, L], 0 at padded keys."""
    if key_padding_mask is None:
        return logits.softmax(dim=-1)
    return logits.masked_fill(key_padding_mask[:, None, None, :], -torch.inf).softmax(dim=-1)


def draw_integers(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform draws for `RealPositions.drawn`, int32, to be kept in a buffer."""
    return torch.randint(2**_DRAW_BITS, size, generator=generator, dtype=torch.int64).to(torch.int32)


@dataclass(frozen=True)
class RealPositions:
    """The real positions of every example, wherever its padding is."""

    count: Tensor  # N, [B] int64
    order: Tensor | None  # [B, L], real positions first, in their order; None when all are real

    @classmethod
    def of(cls, x: Tensor, key_padding_mask: Tensor | None) -> Self:
        """x [B, H, L, D] gives the shape and the device when there is no mask."""
        if key_padding_mask is None:
            return cls(torch.full((x.shape[0],), x.shape[2], device=x.device), None)
        order = key_padding_mask.to(torch.uint8).argsort(dim=-1, stable=True)
        return cls((~key_padding_mask).sum(dim=-1), order)

    def drawn(self, draws: Tensor) -> Tensor:
        """draws [...] -> positions [B, ...], uniform with replacement: the r-th real one, r = floor(draw N / 2^31).

        So the sample of an example depends on its own length and mask alone.
        """
        count = self.count.view(-1, *[1] * draws.dim())
        rank = (draws.to(torch.int64) * count) >> _DRAW_BITS  # [B, ...]
        if self.order is None:
            return rank
        return self.order.gather(1, rank.flatten(1)).view_as(rank)


def gather_rows(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, H, L, D], positions [B, R] or [B, H, R] -> the rows [B, H, R, D]."""
    if positions.dim() == 2:
        positions = positions[:, None].expand(-1, x.shape[1], -1)
    return x.gather(2, positions.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
