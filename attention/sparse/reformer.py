"""Owns Reformer's attention (2001.04451): shared queries and keys, hashed, sorted, and attended chunk by chunk."""

import torch
from torch import Tensor
from torch.nn import functional

from attention.base import Attention, Description, HeadShape
from attention.sparse.blocks import hidden_blocks, masked_softmax, split_blocks

_SELF_PENALTY = 1e5  # a position attends to itself only when nothing else is in reach


class Reformer(Attention):
    """Logits q_i.k_j with k_j = q_j / |q_j|, over the keys in the chunk of i and the one before it, in any round.

    Queries and keys are shared: the slot's k is not used. The unit-norm key takes the place of 1/sqrt(D). Each round
    hashes x to argmax [x R, -x R], sorts by (bucket, position) and cuts into chunks. A pair that meets in several
    rounds counts once. Padding goes to a last bucket, so it fills no chunk of real tokens; the first chunk has no
    predecessor, so the chunks do not form a ring through the padding.
    """

    description = Description(paper="2001.04451", exact=False, complexity="L R c D")
    exemptions = {"U5": "keys are the queries of their positions, and positions order a bucket"}

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        num_hashes: int,
        chunk_size: int,
        buckets_per_chunk: int,
    ) -> None:
        """`buckets_per_chunk`: buckets per chunk of a sequence of max_len (not of the batch's length: the function
        would depend on the padding)."""
        super().__init__()
        if num_hashes < 1 or chunk_size < 1 or buckets_per_chunk < 2 or buckets_per_chunk % 2:
            raise ValueError(
                f"reformer needs num_hashes >= 1, chunk_size >= 1 and an even buckets_per_chunk >= 2, "
                f"got {num_hashes}, {chunk_size} and {buckets_per_chunk}"
            )
        self.chunk_size = chunk_size
        half = buckets_per_chunk * -(-shape.max_len // chunk_size) // 2
        rotations = torch.randn(shape.num_heads, num_hashes, shape.head_dim, half, generator=generator)
        self.register_buffer("rotations", rotations)  # [H, R, D, buckets / 2]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        hidden = self._hidden(q, key_padding_mask)  # [B, P], P = L rounded up to whole chunks
        order, rank = self.sort(q, hidden)  # [B, H, R, P]
        queries, keys, values = (
            split_blocks(_take(functional.pad(x, (0, 0, 0, hidden.shape[-1] - q.shape[2])), order), self.chunk_size)
            for x in (q, functional.normalize(q, dim=-1), v)
        )  # [B, H R, N, c, D]
        barred, is_self, meetings = self._pairs(order, rank, hidden)
        logits = queries @ _with_previous(keys, 0.0).transpose(-2, -1)  # [B, H R, N, c, 2 c]
        logits = logits - meetings.to(q.dtype).log() - is_self * _SELF_PENALTY
        out = masked_softmax(logits, barred) @ _with_previous(values, 0.0)
        log_sum = logits.masked_fill(barred, torch.finfo(q.dtype).min).logsumexp(dim=-1)
        # back to the order of positions, then each round counts in proportion to the sum of its exponentials
        out = out.flatten(2, 3).unflatten(1, order.shape[1:3])  # [B, H, R, P, D]
        out = out.gather(3, rank[..., None].expand_as(out))
        log_sum = log_sum.flatten(2).unflatten(1, order.shape[1:3]).gather(3, rank)  # [B, H, R, P]
        return (log_sum.softmax(dim=2)[..., None] * out).sum(dim=2)[:, :, : q.shape[2]]

    def buckets(self, x: Tensor) -> Tensor:
        """Hash x [B, H, L, D] to argmax [x R, -x R], one bucket per round: [B, H, R, L]."""
        rotated = torch.einsum("bhld,hrdn->bhrln", x.detach(), self.rotations.to(x.dtype))
        return torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1)

    def sort(self, q: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in the order (bucket, position), and the rank of each position: both [B, H, R, P]."""
        length = hidden.shape[-1]
        buckets = functional.pad(self.buckets(q), (0, length - q.shape[2]))
        buckets = buckets.masked_fill(hidden[:, None, None], 2 * self.rotations.shape[-1])  # one more, the last
        order = (buckets * length + torch.arange(length, device=q.device)).argsort(dim=-1)
        return order, order.argsort(dim=-1)

    def _hidden(self, q: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """True at padding and at the positions that fill the last chunk: [B, P]."""
        return hidden_blocks(q, key_padding_mask, self.chunk_size).flatten(1)

    def _pairs(self, order: Tensor, rank: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each query and candidate key in each round, [B, H R, N, c, 2 c]: is the key barred, are the two the same
        position, and in how many rounds do they meet."""
        position = split_blocks(order.flatten(1, 2)[..., None], self.chunk_size)[..., 0]  # [B, H R, N, c]
        candidate = _with_previous(position, -1)  # [B, H R, N, 2 c]; -1: there is no previous chunk
        batch = torch.arange(len(order), device=order.device)[:, None, None, None]
        barred = (hidden[batch, candidate] | (candidate < 0))[..., None, :]
        meetings = torch.zeros((), dtype=torch.int32, device=order.device)
        for chunk in (rank // self.chunk_size).unbind(dim=2):  # [B, H, P], one round after the other
            chunk = chunk.repeat_interleave(order.shape[2], dim=1)  # [B, H R, P]
            of_query, of_key = (chunk.gather(2, x.clamp_min(0).flatten(2)).view_as(x) for x in (position, candidate))
            distance = of_query[..., :, None] - of_key[..., None, :]
            meetings = meetings + ((distance == 0) | (distance == 1)).int()
        is_self = position[..., :, None] == candidate[..., None, :]
        return barred, is_self, meetings.clamp_min(1)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """x [B, H, P, D] in each round's order [B, H, R, P] -> [B, H R, P, D]."""
    repeated = x[:, :, None].expand(-1, -1, order.shape[2], -1, -1)
    return repeated.gather(3, order[..., None].expand(*order.shape, x.shape[-1])).flatten(1, 2)


def _with_previous(blocks: Tensor, fill: float) -> Tensor:
    """Join each chunk to the one before it: [B, H R, N, c, ...] -> [B, H R, N, 2 c, ...]; `fill` before the first."""
    previous = torch.cat([torch.full_like(blocks[:, :, :1], fill), blocks[:, :, :-1]], dim=2)
    return torch.cat([previous, blocks], dim=3)
