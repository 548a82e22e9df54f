"""Owns Sinkhorn attention (2002.11296): blocks sorted by a learned soft permutation, attended beside the own block."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from attention.base import Attention, Description, HeadShape
from attention.sparse.blocks import attend, check_length, gathered, hidden_blocks, join_blocks, split_blocks, window


class Sinkhorn(Attention):
    """Softmax over [own block; sorted block], sorted K' = Pi K and V' = Pi V, Pi [N, N] a soft permutation of blocks.

    Pi = Sinkhorn((W p + b) / temperature), p = the sum of a block's real keys, W per head. Rows and columns are
    normalised in turn in log space, rows last, so that every sorted block is a convex combination. Padding: blocks
    without a real token are in no row and no column; a slot of a sorted block mixes its real tokens only, and its
    softmax weight is multiplied by their share m' of the row of Pi (0 or 1 for a hard permutation).
    """

    description = Description(paper="2002.11296", exact=True, complexity="L b D + L^2 D / b")
    exemptions = {"U5": "blocks of positions are sorted as a whole"}

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        block_size: int,
        num_iterations: int,
        temperature: float,
        gumbel_noise: bool,
    ) -> None:
        """`gumbel_noise`: add Gumbel noise to the sorting logits during training."""
        super().__init__()
        if block_size < 1 or num_iterations < 1 or temperature <= 0:
            raise ValueError(
                f"sinkhorn needs block_size >= 1, num_iterations >= 1 and temperature > 0, "
                f"got {block_size}, {num_iterations} and {temperature}"
            )
        self.block_size, self.num_iterations, self.max_len = block_size, num_iterations, shape.max_len
        self.temperature, self.gumbel_noise = temperature, gumbel_noise
        count = -(-shape.max_len // block_size)
        bound = shape.head_dim**-0.5  # nn.Linear's law
        self.weight = nn.Parameter(torch.empty(shape.num_heads, shape.head_dim, count))
        self.bias = nn.Parameter(torch.empty(shape.num_heads, 1, count))
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        check_length(q.shape[2], self.max_len, "sinkhorn")
        hidden = hidden_blocks(k, key_padding_mask, self.block_size)  # [B, N, b]
        real = (~hidden).to(v.dtype)[:, None, :, :, None]  # [B, 1, N, b, 1]
        queries, keys, values = (split_blocks(x, self.block_size) for x in (q / math.sqrt(q.shape[-1]), k, v))
        keys, values = keys.masked_fill(real == 0, 0.0), values.masked_fill(real == 0, 0.0)
        permutation = self.permutation(keys.sum(dim=3), ~hidden.all(dim=-1))  # [B, H, N, N]
        share = _sort(permutation, real.expand(-1, q.shape[1], -1, -1, -1))  # m' [B, H, N, b, 1]
        # a smaller share adds nothing, and 1 / share^2 can overflow backward
        seen = share > torch.finfo(share.dtype).eps
        divisor = torch.where(seen, share, 1.0)
        sorted_keys, sorted_values = (_sort(permutation, x) / divisor for x in (keys, values))
        candidates = gathered(queries, sorted_keys, sorted_values, ~seen.transpose(-2, -1))
        candidates = replace(candidates, logits=candidates.logits + divisor.log().transpose(-2, -1))
        return join_blocks(attend([window(queries, keys, values, hidden, reach=0), candidates]), q.shape[2])

    def permutation(self, pooled: Tensor, real: Tensor) -> Tensor:
        """pooled [B, H, N, D] and which blocks are real [B, N] -> Pi [B, H, N, N]; rows (exactly) and columns (after
        enough iterations) of real blocks sum to 1, the others are 0."""
        count = pooled.shape[2]
        logits = pooled @ self.weight[:, :, :count] + self.bias[:, :, :count]
        if self.gumbel_noise and self.training:
            logits = logits - torch.empty_like(logits).exponential_().log()
        valid = (real[:, :, None] & real[:, None, :])[:, None]  # [B, 1, N, N]
        log_pi = logits / self.temperature
        for _ in range(self.num_iterations):
            for dim in (-2, -1):
                log_pi = log_pi.masked_fill(~valid, torch.finfo(log_pi.dtype).min)
                log_pi = log_pi - log_pi.logsumexp(dim=dim, keepdim=True)
        return log_pi.masked_fill(~valid, -torch.inf).exp()


def _sort(permutation: Tensor, x: Tensor) -> Tensor:
    """Pi [B, H, N, N] on the blocks of x [B, H, N, b, D]."""
    return (permutation @ x.flatten(3)).unflatten(3, x.shape[3:])
