"""Owns the part of a Maclaurin map that is expanded and not estimated: the degrees 0 to 2, as features.

Legend: B batch, H heads, L length, D head_dim.
"""

import math
from collections.abc import Callable

from torch import Tensor

from attention.feature_maps.symmetric_square import num_pairs, symmetric_square


def exact_rows(rows: Tensor, exact_degree: int, a: Callable[[int], float], constant: Tensor | None) -> list[Tensor]:
    """Features whose dot product is sum_{n <= exact_degree} a(n) t^n, for rows [B, H, D, L] scaled by D^-1/4.
    `constant` [B, H, 1, L] replaces a_0 for centred queries."""
    pieces = []
    if constant is not None:
        pieces.append(constant / math.sqrt(a(0)))
    elif exact_degree >= 0:
        pieces.append(rows.new_full((), math.sqrt(a(0))).expand(*rows.shape[:-2], 1, rows.shape[-1]))
    if exact_degree >= 1:
        pieces.append(rows * math.sqrt(a(1)))
    if exact_degree >= 2:
        pieces.append(symmetric_square(rows.transpose(-2, -1), math.sqrt(a(2))).transpose(-2, -1))
    return pieces


def exact_width(exact_degree: int, head_dim: int) -> int:
    """Number of features of degrees 0 to exact_degree. Raises ValueError for a degree other than -1 (none) to 2."""
    if exact_degree not in (-1, 0, 1, 2):
        raise ValueError(f"exact_degree={exact_degree} is not supported; choose -1 (none), 0, 1 or 2")
    return (0, 1, 1 + head_dim, 1 + head_dim + num_pairs(head_dim))[exact_degree + 1]


def check_width(num_features: int, num_random: int, exact_degree: int, head_dim: int, is_complex: bool) -> None:
    """Raises ValueError where `num_features` cannot hold the exact part and a random one."""
    least = num_features - num_random + (1 + is_complex if exact_degree < 1 else 0)
    if num_features < least:
        raise ValueError(
            f"num_features={num_features} is too small: exact_degree={exact_degree} with head_dim={head_dim} needs at "
            f"least {least}; raise num_features or lower exact_degree"
        )
    if is_complex and num_random % 2:
        raise ValueError(
            f"complex projections come in pairs of real features, but num_features={num_features} leaves {num_random} "
            f"random ones beside the exact part; use {num_features - 1} or {num_features + 1}"
        )
