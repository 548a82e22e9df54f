"""Owns Longformer's attention (2004.05150): a sliding window and a few global positions."""

import math

import torch
from torch import Tensor

from attention.base import Attention, Description, HeadShape
from attention.softmax import softmax_attention
from attention.sparse.blocks import attend, gathered, hidden_blocks, join_blocks, split_blocks, window


class Longformer(Attention):
    """N(i) = {|i - j| <= window / 2} and the first `num_global` positions, which attend to everything themselves.

    The paper gives global positions q/k/v projections of their own; those lie outside the slot, so they are shared.
    """

    description = Description(paper="2004.05150", exact=True, complexity="L w D")
    exemptions = {"U5": "the neighbourhood is a window of positions"}

    def __init__(self, shape: HeadShape, generator: torch.Generator, *, window: int, num_global: int) -> None:
        super().__init__()
        if window < 2 or window % 2 or num_global < 0:
            raise ValueError(
                f"longformer needs an even window >= 2 (both sides together) and num_global >= 0, "
                f"got {window} and {num_global}"
            )
        self.window, self.num_global = window, num_global

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        length, reach = q.shape[2], self.window // 2
        block = min(reach, length)  # one block on either side then covers the window
        num_global = min(self.num_global, length)
        hidden = hidden_blocks(k, key_padding_mask, block)  # [B, N, b]
        hidden_globals = hidden.flatten(1)[:, None, None, None, :num_global]  # [B, 1, 1, 1, G]
        local = hidden.flatten(1).clone()
        local[:, :num_global] = True  # counted once, as global keys
        blocks = [split_blocks(x, block) for x in (q / math.sqrt(q.shape[-1]), k, v)]
        key_sets = [window(*blocks, local.view_as(hidden), reach=1, within=reach + 1)]
        if num_global:
            global_k, global_v = (x[:, :, None, :num_global] for x in (k, v))
            key_sets.append(gathered(blocks[0], global_k, global_v, hidden_globals))
        out = join_blocks(attend(key_sets), length)
        if not num_global:
            return out
        rows = softmax_attention(q[:, :, :num_global], k, v, key_padding_mask)
        return torch.cat([rows, out[:, :, num_global:]], dim=2)
