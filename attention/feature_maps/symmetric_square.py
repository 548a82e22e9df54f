"""Owns the exact features of the squared dot product: (x.y)^2 in D (D + 1) / 2 coordinates instead of D^2."""

import math

import torch
from torch import Tensor


def num_pairs(dim: int) -> int:
    """Width of `symmetric_square` for vectors of width `dim`."""
    return dim * (dim + 1) // 2


def symmetric_square(x: Tensor, scale: float = 1.0) -> Tensor:
    """x [..., D] -> [..., D (D + 1) / 2] with out(x).out(y) = scale^2 (x.y)^2.

    The unordered pairs {c, e} are enumerated by the circular shift e - c = 0, 1, 2, ...: the products of x with its
    own shifts. Every pair occurs once among the first D (D + 1) / 2 of them, for even and odd D, so one multiplication
    of strided views does it, with no gather (whose backward adds in random order on a GPU).
    """
    dim = x.shape[-1]
    shifts = torch.cat([x, x], dim=-1).unfold(-1, dim, 1)[..., : dim // 2 + 1, :]  # [..., s, c] = x[..., (c + s) % D]
    products = (x.unsqueeze(-2) * shifts).flatten(-2)[..., : num_pairs(dim)]
    weight = x.new_full((num_pairs(dim),), scale * math.sqrt(2.0))  # an off-diagonal pair occurs twice in (x.y)^2
    weight[:dim] = scale
    return products * weight
