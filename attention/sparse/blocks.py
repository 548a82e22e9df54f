"""Owns the engine of sparse attention: sequences cut into blocks, neighbours gathered, one softmax over it all.

Legend: B batch, H heads, L length, D head_dim, N number of blocks, b block size, C candidate keys of a block.
A pattern is a list of disjoint KeySets, so no L x L matrix is ever formed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def split_blocks(x: Tensor, block_size: int) -> Tensor:
    """[B, H, L, D] -> [B, H, N, b, D], N = ceil(L / b), the rest filled with 0."""
    return functional.pad(x, (0, 0, 0, -x.shape[2] % block_size)).unflatten(2, (-1, block_size))


def join_blocks(x: Tensor, length: int) -> Tensor:
    """[B, H, N, b, D] -> [B, H, L, D]."""
    return x.flatten(2, 3)[:, :, :length]


def hidden_blocks(x: Tensor, key_padding_mask: Tensor | None, block_size: int) -> Tensor:
    """True at padding and at the positions that `split_blocks` appends to x [B, H, L, D]: [B, N, b]."""
    if key_padding_mask is None:
        key_padding_mask = torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
    return functional.pad(key_padding_mask, (0, -x.shape[2] % block_size), value=True).unflatten(1, (-1, block_size))


def gather_neighbours(blocks: Tensor, dim: int, reach: int, fill: float = 0.0) -> Tensor:
    """Join each block with the `reach` blocks on either side: [..., N, b, ...] -> [..., N, (2 reach + 1) b, ...].

    `dim` is the axis N; blocks beyond the ends hold `fill`.
    """
    edge = list(blocks.shape)
    edge[dim] = reach
    end = blocks.new_full(edge, fill)
    padded = torch.cat([end, blocks, end], dim=dim)
    count = blocks.shape[dim]
    return torch.cat([padded.narrow(dim, offset, count) for offset in range(2 * reach + 1)], dim=dim + 1)


@dataclass(frozen=True)
class KeySet:
    """Candidate keys of every query: logits [B, H, N, b, C], `hidden` (broadcastable to them) where one is not allowed,
    and `mix`, which turns weights [B, H, N, b, C] into sums of values [B, H, N, b, D]."""

    logits: Tensor
    hidden: Tensor
    mix: Callable[[Tensor], Tensor]


def gathered(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> KeySet:
    """q [B, H, N, b, D] (scaled); keys, values [B, H, N or 1, C, D], shared by the queries of a block (or by all)."""
    return KeySet(q @ keys.transpose(-2, -1), hidden, lambda weights: weights @ values)


def window(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, reach: int, within: int | None = None) -> KeySet:
    """The own block and `reach` blocks on either side, closer than `within` positions: |i - j| < within.

    q (scaled), k, v [B, H, N, b, D]; hidden [B, N, b].
    """
    hidden_keys = gather_neighbours(hidden, dim=1, reach=reach, fill=True)[:, None, :, None]  # [B, 1, N, 1, C]
    if within is not None:
        query = torch.arange(q.shape[3], device=q.device)[:, None]
        key = torch.arange(hidden_keys.shape[-1], device=q.device) - reach * q.shape[3]
        hidden_keys = hidden_keys | ((query - key).abs() >= within)  # [B, 1, N, b, C]
    return gathered(q, gather_neighbours(k, 2, reach), gather_neighbours(v, 2, reach), hidden_keys)


def attend(key_sets: Sequence[KeySet]) -> Tensor:
    """One softmax over disjoint key sets -> [B, H, N, b, D]; a query without any allowed key gets 0."""
    hidden = torch.cat([s.hidden.expand(s.logits.shape) for s in key_sets], dim=-1)
    weights = masked_softmax(torch.cat([s.logits for s in key_sets], dim=-1), hidden)
    parts = weights.split([s.logits.shape[-1] for s in key_sets], dim=-1)
    return sum(s.mix(part) for s, part in zip(key_sets[1:], parts[1:], strict=True)) + key_sets[0].mix(parts[0])


def masked_softmax(logits: Tensor, hidden: Tensor) -> Tensor:
    """Softmax over the last axis without the hidden entries; 0, with gradient 0, where all of them are hidden."""
    # finfo.min and not -inf: a row of -inf has the softmax NaN, which the second line could not remove from gradients
    weights = logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(dim=-1)
    return weights.masked_fill(hidden, 0.0)


def check_length(length: int, max_len: int, mechanism: str) -> None:
    """For mechanisms with one parameter or one draw per position or block."""
    if length > max_len:
        raise ValueError(f"{mechanism} was built for max_len {max_len} and got {length} positions; raise max_len")
