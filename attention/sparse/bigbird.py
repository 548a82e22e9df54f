"""Owns BigBird's attention (2007.14062): window, global and random blocks."""

import math

import torch
from torch import Tensor

from attention.base import Attention, Description, HeadShape
from attention.softmax import softmax_attention
from attention.sparse.blocks import attend, check_length, gathered, hidden_blocks, join_blocks, split_blocks

_WINDOW = 3  # blocks: the own one and one on either side
_GLOBAL = 2  # blocks: the first and the last


class BigBird(Attention):
    """Block a attends to the blocks a - 1, a, a + 1, to the first and the last, and to `num_random` others; the first
    and the last block attend to everything.

    Each head ranks all blocks for each query block once (buffer `ranking`, for max_len); its random blocks are the
    best ranked that exist and are in no other set. So the draw has no duplicates, holds at any length, and is the same
    in every batch. "Last" is the last block that holds a real token: padding changes nothing.
    """

    description = Description(paper="2007.14062", exact=True, complexity="L b D")
    exemptions = {"U5": "the neighbourhood is a pattern of blocks of positions"}

    def __init__(self, shape: HeadShape, generator: torch.Generator, *, block_size: int, num_random: int) -> None:
        super().__init__()
        if block_size < 1 or num_random < 0:
            raise ValueError(f"bigbird needs block_size >= 1, num_random >= 0; got {block_size} and {num_random}")
        self.block_size, self.num_random, self.max_len = block_size, num_random, shape.max_len
        count = -(-shape.max_len // block_size)
        noise = torch.rand(shape.num_heads, count, count, generator=generator, dtype=torch.float64)
        self.register_buffer("ranking", noise.argsort(dim=-1).to(torch.int32))  # integers: no cast can tie two of them

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        check_length(q.shape[2], self.max_len, "bigbird")
        hidden = hidden_blocks(k, key_padding_mask, self.block_size)  # [B, N, b]
        blocks = [split_blocks(x, self.block_size) for x in (q, k, v)]
        last = _last_block(hidden)  # [B]
        sparse = self._sparse_rows(*blocks, hidden, last)  # [B, H, N, b, D]
        rows = blocks[0][torch.arange(len(q), device=q.device)[:, None], :, torch.stack([0 * last, last], dim=1)]
        rows = softmax_attention(rows.transpose(1, 2).flatten(2, 3), k, v, key_padding_mask)
        rows = rows.unflatten(2, (2, self.block_size))  # [B, H, 2, b, D]
        block = torch.arange(hidden.shape[1], device=q.device)
        is_last = (block == last[:, None])[:, None, :, None, None]
        out = torch.where(is_last, rows[:, :, 1:], sparse)
        out = torch.where((block == 0)[:, None, None], rows[:, :, :1], out)
        return join_blocks(out, q.shape[2])

    def pattern(self, last: Tensor, count: int) -> Tensor:
        """Which of `count` blocks each block attends to, global rows apart, when `last` [B] ends the real tokens:
        [B, H, N, N]."""
        block = torch.arange(count, device=last.device)
        fixed = (block[:, None] - block).abs() <= _WINDOW // 2
        fixed = fixed | (block == 0) | (block == last[:, None, None])  # [B, N, N]
        free = ~fixed & (block <= last[:, None, None])
        ranking = self.ranking[:, :count, :count].masked_fill(~free[:, None], -1)  # [B, H, N, N]
        ranks, drawn = ranking.topk(min(self.num_random, count), dim=-1)
        random = torch.zeros_like(ranking, dtype=torch.bool).scatter(-1, drawn, ranks >= 0)
        return random | fixed[:, None]

    def _sparse_rows(self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, last: Tensor) -> Tensor:
        """Every block attending to its own M blocks; q, k, v [B, H, N, b, D], hidden [B, N, b] -> [B, H, N, b, D]."""
        count = hidden.shape[1]
        width = min(_WINDOW + _GLOBAL + self.num_random, count)
        found, chosen = self.pattern(last, count).to(torch.uint8).topk(width, dim=-1)  # [B, H, N, M]
        batch = torch.arange(len(q), device=q.device)[:, None, None, None]
        hidden = hidden[batch, chosen] | (found == 0)[..., None]  # [B, H, N, M, b]
        keys, values = (_take_blocks(x, chosen) for x in (k, v))  # [B, H, N, M b, D]
        return attend([gathered(q / math.sqrt(q.shape[-1]), keys, values, hidden.flatten(-2)[:, :, :, None])])


def _last_block(hidden: Tensor) -> Tensor:
    """Index of the last block of hidden [B, N, b] that holds a real token: [B]."""
    real = ~hidden.all(dim=-1)
    return (real * torch.arange(hidden.shape[1], device=hidden.device)).amax(dim=-1)


def _take_blocks(x: Tensor, chosen: Tensor) -> Tensor:
    """x [B, H, N, b, D] at chosen [B, H, N, M] -> [B, H, N, M b, D]."""
    batch, heads, count = x.shape[:3]
    offset = torch.arange(batch * heads, device=x.device).view(batch, heads, 1, 1) * count
    taken = x.flatten(0, 2).index_select(0, (chosen + offset).flatten())
    return taken.view(*chosen.shape, *x.shape[3:]).flatten(3, 4)
