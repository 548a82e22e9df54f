"""Owns features that are products of random projections, sorted by level: level j holds the j-th factor of each feature.

Legend: B batch, H heads, L length, D head_dim, C rows of all levels together, m_j features with at least j factors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from attention.projections.base import Projection


def sample_levels(law: Projection, counts: Mapping[int, int], head_dim: int, generator: torch.Generator) -> Tensor:
    """Signs sorted by level, then by degree (descending): [C, D], or [2C, D] with imaginary parts below real ones.

    Each degree has blocks of its own and each factor a draw of its own, which the closed-form variance relies on.
    """
    factors = {n: [law.sample(count, head_dim, generator) for _ in range(n)] for n, count in counts.items()}
    depth = max(counts, default=0)
    rows = [factors[n][j] for j in range(depth) for n in counts if n > j]
    signs = torch.cat(rows) if rows else torch.empty(0, head_dim)
    return torch.cat([signs.real, signs.imag]) if signs.is_complex() else signs


def count_levels(degrees: Tensor) -> list[int]:
    """m_j = number of features of degree >= j, for j = 1, 2, ..."""
    values = degrees.tolist()
    return [sum(n >= j for n in values) for j in range(1, max(values, default=0) + 1)]


def fold(levels: tuple[Tensor, ...]) -> list[Tensor]:
    """Products over shrinking levels [.., m_j, L], m_1 >= m_2 >= ...: rows 0..m_2 of level 1 times the product of the
    deeper levels, then the rest of level 1. Runs from the deepest level, so each product is touched once."""
    product = levels[-1]
    pieces = [product]
    for level in reversed(levels[:-1]):
        deep = product.shape[-2]
        pieces = [level[..., :deep, :] * product, level[..., deep:, :]]
        product = torch.cat(pieces, dim=-2) if level is not levels[0] else product
    return pieces
