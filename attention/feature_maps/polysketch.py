"""Owns PolySketch: non-negative sketches of the polynomial kernel t^p, with random or learned sketches.

Legend: B batch, H heads, L length, D head_dim, F num_features, r sketch_dim.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attention.base import Description, HeadShape
from attention.feature_maps.base import FeatureMap, Features, Sign
from attention.feature_maps.symmetric_square import num_pairs, symmetric_square


class PolySketch(FeatureMap):
    """phi(x).phi(y) = (m(x).m(y))^2 >= 0, m a sketch of degree p/2 and width r (2310.01655, PolySketchFormer).

    x = LayerNorm(q or k) D^(-1/4), the LayerNorm's affine shared by queries, keys and heads as in the released code,
    so that t = x.y is of order 1. F = r (r + 1) / 2 (p = 2: m(x) = x, exact, F = D (D + 1) / 2). Use it with a
    `sum_plus` normaliser of constant 1, the paper's sink.

    The random sketch of degree n is built from two independent ones of degree n / 2, down to the identity:
    m(x) = (G m'(x)) * (G' m''(x)) / sqrt(r), G and G' Gaussian. It is biased upwards, by the variance of m(x).m(y):
    E[phi(x).phi(y)] = t^p + Var[m(x).m(y)], in closed form in `kernel`; at p = 4 orthogonal x, y keep a weight of
    |x|^4 |y|^4 / r. Its features are not averages of independent ones, so there is no `second_moment` of one feature.

    The learned sketch puts networks in place of G and G': m = sqrt(r) tanh(f(m') f'(m'') / sqrt(r)), and has no
    closed form.
    """

    sign: ClassVar[Sign] = "positive_weights"
    description = Description(paper="2310.01655", exact=False, complexity="L r (D + r D)")

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        degree: Literal[2, 4, 8],
        sketch_dim: int | None,
        learned: bool,
        layer_norm: bool,
    ) -> None:
        """`degree`: p. `sketch_dim`: r, null for p = 2. `learned`: networks instead of Gaussian matrices.
        `layer_norm`: normalise q and k first; without it t^p is unbounded."""
        super().__init__()
        if degree not in (2, 4, 8):
            raise ValueError(f"PolySketch needs degree 2, 4 or 8, twice the degree of its sketch; got {degree}")
        if degree == 2 and (learned or sketch_dim is not None):
            raise ValueError("PolySketch of degree 2 is exact, it has no sketch: use learned=false sketch_dim=null")
        if degree > 2 and sketch_dim is None:
            raise ValueError(f"PolySketch of degree {degree} needs a sketch_dim")
        self.degree, self.learned, self.head_dim = degree, learned, shape.head_dim
        self.sketch_dim = shape.head_dim if degree == 2 else sketch_dim  # the sketch of degree 1 is x itself
        self.norm = nn.LayerNorm(shape.head_dim) if layer_norm else nn.Identity()
        build = LearnedSketch if learned else GaussianSketch
        self.sketch = _build(build, degree // 2, shape.head_dim, self.sketch_dim, generator)

    @property
    def num_outputs(self) -> int:
        return num_pairs(self.sketch_dim)

    def scaled(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.head_dim**-0.25

    def forward(self, x: Tensor, is_query: bool, prepared: Any = None) -> Features:
        return Features(symmetric_square(self.sketch(self.scaled(x))))

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean over the random sketches, by recursion over their levels.

        Write T = m(x).m(y) and N = |m(x)|^2 |m(y)|^2. A level of r products of Gaussian projections of two independent
        sketches turns (E T^2, E N) = (t, n) into (t^2 + ((n + 2 t)^2 - t^2) / r, n^2 + ((n + 2 t)^2 - n^2) / r).
        """
        if self.learned:
            raise NotImplementedError("a learned sketch estimates no fixed kernel")
        square, norms = (x * y).sum(dim=-1) ** 2, x.square().sum(dim=-1) * y.square().sum(dim=-1)
        for _ in range(int(math.log2(self.degree)) - 1):
            fourth = (norms + 2 * square) ** 2
            square, norms = (
                square**2 + (fourth - square**2) / self.sketch_dim,
                norms**2 + (fourth - norms**2) / self.sketch_dim,
            )
        return square


class GaussianSketch(nn.Module):
    """x [..., D] -> [..., r], unbiased for the product of the two inner sketches' kernels."""

    def __init__(
        self, left: nn.Module, right: nn.Module, in_dim: int, sketch_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.left, self.right = left, right
        self.register_buffer("left_matrix", torch.randn(in_dim, sketch_dim, generator=generator))
        self.register_buffer("right_matrix", torch.randn(in_dim, sketch_dim, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        # 1/sqrt(r) once: the released code divides both factors, so that its kernel is t^4 / r^2 against a sink of 1
        product = (self.left(x) @ self.left_matrix) * (self.right(x) @ self.right_matrix)
        return product * self.left_matrix.shape[-1] ** -0.5


class LearnedSketch(nn.Module):
    """x [..., D] -> [..., r] through two networks; the tanh bounds each coordinate by sqrt(r)."""

    def __init__(
        self, left: nn.Module, right: nn.Module, in_dim: int, sketch_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.left, self.right = left, right
        self.left_network, self.right_network = (_network(in_dim, sketch_dim) for _ in range(2))
        self.bound = sketch_dim**0.5

    def forward(self, x: Tensor) -> Tensor:
        product = self.left_network(self.left(x)) * self.right_network(self.right(x))
        return self.bound * torch.tanh(product / self.bound)


def _network(in_dim: int, sketch_dim: int) -> nn.Sequential:
    width = 8 * sketch_dim  # the released code's
    return nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, width), nn.GELU(), nn.Linear(width, sketch_dim))


def _build(
    sketch: type[GaussianSketch] | type[LearnedSketch],
    degree: int,
    head_dim: int,
    sketch_dim: int,
    generator: torch.Generator,
) -> nn.Module:
    """The binary tree of sketches of a degree that is a power of 2; its leaves are the vector itself."""
    if degree == 1:
        return nn.Identity()
    left, right = (_build(sketch, degree // 2, head_dim, sketch_dim, generator) for _ in range(2))
    return sketch(left, right, head_dim if degree == 2 else sketch_dim, sketch_dim, generator)
