"""Owns the discrete random features of the softmax kernel: random monomials with Poisson or geometric degrees.

Legend: B batch, H heads, L length, D head_dim, M num_features, F = M.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from attention.base import Description, HeadShape
from attention.feature_maps.base import FeatureMap, Features, Sign


class _RandomMonomials(FeatureMap):
    """phi_m(x) = c_m prod_l x_l^{n_ml} / sqrt(M), x = D^{-1/4} q, y = D^{-1/4} k, degrees n [M, D] drawn once."""

    sign: ClassVar[Sign] = "signed"
    description = Description(paper="2205.15317", exact=False, complexity="L F D")

    def __init__(self, degrees: Tensor, log_coefficient: Tensor) -> None:
        """degrees [M, D] or, one draw per head, [H, M, D]; log c [M] or [H, M]."""
        super().__init__()
        self.num_features, head_dim = degrees.shape[-2:]
        self.scale = head_dim**-0.25
        self.register_buffer("degrees", degrees)
        self.register_buffer("log_coefficient", log_coefficient.unsqueeze(-2))  # [.., 1, M]

    @property
    def num_outputs(self) -> int:
        return self.num_features

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale

    def forward(self, x: Tensor, is_query: bool, prepared: Any = None) -> Features:
        x = self.scaled(x)
        powers = self.degrees.transpose(-2, -1)  # [D, M] or [H, D, M]
        # As sign and logarithm a monomial is a matrix product, and the shared stabiliser keeps it from overflowing.
        # At x_l = 0 the logarithm is bounded: 0^0 is 1, and 0^n vanishes beside everything else.
        magnitude = x.abs().clamp_min(torch.finfo(x.dtype).tiny).log() @ powers  # [B, H, L, M]
        odd = (x < 0).to(x.dtype) @ powers % 2
        return Features(1 - 2 * odd, magnitude + (self.log_coefficient - math.log(self.num_features) / 2))

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(dim=-1).exp()


class PoissonRF(_RandomMonomials):
    """phi(x) = exp(lambda D / 2) prod_l x_l^{n_l} lambda^{-n_l / 2}, n_l ~ Poisson(lambda) (PoisRF, 2205.15317)."""

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        num_features: int,
        rate: float | None,
        per_head: bool = False,
    ) -> None:
        """`rate`: lambda; None takes D^{-1/2}, the best for q and k of unit variance (sqrt of the mean of x^2 y^2)."""
        dim = shape.head_dim
        rate = dim**-0.5 if rate is None else rate
        if rate <= 0:
            raise ValueError(f"PoissonRF: rate must be positive, got {rate}")
        degrees = torch.poisson(torch.full(_size(shape, num_features, per_head), rate), generator=generator)
        super().__init__(degrees, rate * dim / 2 - degrees.sum(dim=-1) * (math.log(rate) / 2))
        self.rate = rate

    def second_moment(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.rate * x.shape[-1] + (x * y).square().sum(dim=-1) / self.rate).exp()


class GeometricRF(_RandomMonomials):
    """phi(x) = p^{-D/2} prod_l x_l^{n_l} (1-p)^{-n_l/2} (n_l!)^{-1/2}, P(n_l = n) = p (1-p)^n (GeomRF, 2205.15317)."""

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        num_features: int,
        success: float | None,
        per_head: bool = False,
    ) -> None:
        """`success`: p. None takes the best for q and k of unit variance, to second order in x_l y_l.

        With s = 1/D, the mean of (x_l y_l)^2, that p minimises -log p + s / (1 - p).
        """
        s = 1 / shape.head_dim
        success = 1 + s / 2 - math.sqrt(s + s * s / 4) if success is None else success
        if not 0 < success < 1:
            raise ValueError(f"GeometricRF: success must lie strictly between 0 and 1, got {success}")
        degrees = torch.empty(_size(shape, num_features, per_head)).geometric_(success, generator=generator) - 1
        per_degree = degrees * math.log(1 - success) + (degrees + 1).lgamma() + math.log(success)
        super().__init__(degrees, -per_degree.sum(dim=-1) / 2)
        self.success = success

    def second_moment(self, x: Tensor, y: Tensor) -> Tensor:
        bessel = torch.special.i0(2 * (x * y).abs() / math.sqrt(1 - self.success))
        return (bessel / self.success).prod(dim=-1)


def _size(shape: HeadShape, num_features: int, per_head: bool) -> tuple[int, ...]:
    if num_features < 1:
        raise ValueError(f"num_features must be at least 1, got {num_features}")
    return (shape.num_heads, num_features, shape.head_dim) if per_head else (num_features, shape.head_dim)
