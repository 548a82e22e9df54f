"""Owns Informer's ProbSparse attention: exact softmax rows for the queries that are furthest from uniform.

Legend: B batch, H heads, L length, D head_dim, N real positions of an example, u selected queries, U sampled keys.
"""

import math

import torch
from torch import Tensor

from attention.base import Attention, Description, HeadShape, mean_over_keys
from attention.low_rank.real_keys import RealPositions, draw_integers, gather_rows, masked_softmax

_SAMPLES_AT_ONCE = 4  # bounds the memory of the gathered keys to that many copies of k


class Informer(Attention):
    """The u queries of largest M_i = max_j s_ij - mean_j s_ij get their softmax row, all others the mean value.

    Encoder version (2012.07436). s_ij = q_i.k_j / sqrt(D) over U keys per query, drawn with replacement among the
    example's real positions; padded queries are never selected. The draw belongs to the query's position, is shared by
    heads, made once and kept in a buffer, in training and evaluation alike. (The released code draws anew at every
    forward, ignores the padding, and divides the sum of the U samples by L instead of U.)
    """

    description = Description(paper="2012.07436", exact=False, complexity="L (u + U) D")
    exemptions = {"U5": "the keys that select the queries are sampled by position"}

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        num_samples: int | None,
        num_queries: int | None,
        factor: int | None,
    ) -> None:
        """Either `num_samples` U and `num_queries` u, the same for every length, or `factor` c with
        U = u = c ceil(ln N)."""
        super().__init__()
        fixed = num_samples is not None and num_queries is not None and factor is None
        scaled = num_samples is None and num_queries is None and factor is not None
        if not (fixed or scaled):
            raise ValueError(
                f"Informer needs either num_samples and num_queries, or factor, and null for the rest; "
                f"got num_samples={num_samples}, num_queries={num_queries}, factor={factor}"
            )
        self.num_samples, self.num_queries, self.factor = num_samples, num_queries, factor
        max_samples = self._budget(num_samples, shape.max_len)
        self.register_buffer("draws", draw_integers((shape.max_len, max_samples), generator))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        length, max_len = q.shape[2], self.draws.shape[0]
        if length != k.shape[2] or length > max_len:
            raise ValueError(
                f"Informer is a self-attention over at most max_len={max_len} positions; "
                f"got {length} queries and {k.shape[2]} keys"
            )
        q = q * q.shape[-1] ** -0.5
        real = RealPositions.of(q, key_padding_mask)
        measure = self.sparsity(q, k, real)
        if key_padding_mask is not None:
            measure = measure.masked_fill(key_padding_mask[:, None, :], -torch.inf)
        num_selected = min(self._budget(self.num_queries, length), length)
        selected = measure.topk(num_selected, dim=-1).indices  # [B, H, u], best first
        weights = masked_softmax(gather_rows(q, selected) @ k.transpose(-2, -1), key_padding_mask)  # [B, H, u, L]
        mean = mean_over_keys(v, key_padding_mask)
        within = torch.arange(num_selected, device=q.device) < self._budgets(self.num_queries, real)  # [B, 1, u or 1]
        rows = torch.where(within.unsqueeze(-1), weights @ v, mean)
        positions = selected.unsqueeze(-1).expand(-1, -1, -1, v.shape[-1])
        return mean.expand(-1, -1, length, -1).scatter(2, positions, rows)

    @torch.no_grad()
    def sparsity(self, q: Tensor, k: Tensor, real: RealPositions) -> Tensor:
        """M [B, H, L] of scaled queries q: a selection, hence without gradient."""
        length = q.shape[2]
        budgets = self._budgets(self.num_samples, real).unsqueeze(-1)  # U of each example, [B or 1, 1, 1, 1]
        largest, total = torch.full_like(q[..., 0], -torch.inf), torch.zeros_like(q[..., 0])
        for start in range(0, self._budget(self.num_samples, length), _SAMPLES_AT_ONCE):
            draws = self.draws[:length, start : start + _SAMPLES_AT_ONCE]
            keys = gather_rows(k, real.drawn(draws).flatten(1)).unflatten(2, draws.shape)  # [B, H, L, samples, D]
            scores = (keys @ q.unsqueeze(-1)).squeeze(-1)
            within = start + torch.arange(draws.shape[1], device=q.device) < budgets
            largest = torch.maximum(largest, scores.masked_fill(~within, -torch.inf).amax(dim=-1))
            total = total + scores.masked_fill(~within, 0.0).sum(dim=-1)
        return largest - total / budgets.squeeze(-1).clamp_min(1)

    def _budget(self, fixed: int | None, length: int) -> int:
        """U or u at a length: the fixed number, or c ceil(ln n)."""
        return self.factor * math.ceil(math.log(length)) if fixed is None else fixed

    def _budgets(self, fixed: int | None, real: RealPositions) -> Tensor:
        """U or u of each example, [B, 1, 1]."""
        if fixed is not None:
            return torch.full_like(real.count, fixed)[:, None, None]
        return self.factor * real.count.double().log().ceil().long()[:, None, None]
