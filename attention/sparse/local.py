"""Owns local attention: softmax inside contiguous blocks, as the Long Range Arena (2011.04006) describes it."""

import math

import torch
from torch import Tensor

from attention.base import Attention, Description, HeadShape
from attention.sparse.blocks import attend, hidden_blocks, join_blocks, split_blocks, window


class Local(Attention):
    """N(i) = the block of i and `overlap` blocks on either side; with overlap 0 blocks never communicate.

    The arena's own code attends over a comb (every (L / b)-th position) under a contiguous padding mask; not here.
    """

    description = Description(paper="2011.04006", exact=True, complexity="L b D")
    exemptions = {"U5": "the neighbourhood is a block of positions"}

    def __init__(self, shape: HeadShape, generator: torch.Generator, *, block_size: int, overlap: int) -> None:
        super().__init__()
        if block_size < 1 or overlap < 0:
            raise ValueError(f"local attention needs block_size >= 1 and overlap >= 0, got {block_size} and {overlap}")
        self.block_size, self.overlap = block_size, overlap

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        hidden = hidden_blocks(k, key_padding_mask, self.block_size)
        blocks = [split_blocks(x, self.block_size) for x in (q / math.sqrt(q.shape[-1]), k, v)]
        return join_blocks(attend([window(*blocks, hidden, self.overlap)]), q.shape[2])
