"""Owns the trigonometric random features: TrigRF of the softmax kernel, and random feature attention (RFA).

Legend: B batch, H heads, L length, D head_dim, M num_features (random vectors w), F = 2M.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attention.base import Description, HeadShape
from attention.feature_maps.base import FeatureMap, Features, Sign
from attention.projections.base import Projection
from attention.projections.draws import Draws, check_rows
from attention.projections.moments import characteristic


class TrigRF(FeatureMap):
    """phi(x) = exp(|x|^2 / 2) [cos w.x, sin w.x] / sqrt(M), x = D^{-1/4} q, y = D^{-1/4} k (2009.14794).

    E[phi(x).phi(y)] = exp(x.y), with variance exp(|x|^2 + |y|^2) (1 - exp(-|x - y|^2))^2 / (2 M): none at x = y, and
    large where the kernel is small. Estimates are signed, so a normaliser must survive a sum at or below 0.
    """

    sign: ClassVar[Sign] = "signed"
    description = Description(paper="2009.14794", exact=False, complexity="L F D")

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        projection: Projection,
        num_features: int,
        per_head: bool = False,
        allow_biased: bool = False,
    ) -> None:
        super().__init__()
        check_rows(projection, allow_biased, needs_chi_norms=False)
        self.law, self.scale = projection, shape.head_dim**-0.25
        self.projection = Draws(projection, num_features, shape, generator, per_head)

    @property
    def num_outputs(self) -> int:
        return 2 * self.projection.num_rows

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale

    def forward(self, x: Tensor, is_query: bool, prepared: Any = None) -> Features:
        x = self.scaled(x)
        # exp(|x|^2 / 2) as logits: it cancels for queries, and the stabiliser takes out the keys' maximum.
        half_norm = x.square().sum(dim=-1, keepdim=True) / 2  # [B, H, L, 1]
        return Features(waves(x, self.projection(), self.projection.amplitudes(is_query)), half_norm)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return _half_norms(x, y).exp() * characteristic(self.law, x - y)

    def second_moment(self, x: Tensor, y: Tensor) -> Tensor:
        return (2 * _half_norms(x, y)).exp() * (1 + characteristic(self.law, 2 * (x - y))) / 2


class RandomFeatureAttention(FeatureMap):
    """phi(x) = [cos w.x, sin w.x] / sqrt(M), x = sigma q / (|q| + c) / tau: random feature attention (2103.02143).

    sigma [H, D] is learned from 1. E[phi(x).phi(y)] = exp(-|x - y|^2 / 2) with Gaussian rows; at sigma = 1 that is
    exp(cos(q, k) / tau^2) up to a constant, and D^{-1/4} has no place in it. The causal gate of the paper is left out.
    One matrix is drawn for good, where the authors' code takes one of a pool in each training step and the first
    of it in evaluation.
    """

    sign: ClassVar[Sign] = "signed"
    description = Description(paper="2103.02143", exact=False, complexity="L F D")

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        projection: Projection,
        num_features: int,
        temperature: float,
        norm_epsilon: float,
        per_head: bool = False,
        allow_biased: bool = False,
    ) -> None:
        """`temperature`: tau. `norm_epsilon`: c."""
        super().__init__()
        check_rows(projection, allow_biased, needs_chi_norms=False)
        if temperature <= 0:
            raise ValueError(f"RandomFeatureAttention: temperature must be positive, got {temperature}")
        self.law, self.temperature, self.norm_epsilon = projection, temperature, norm_epsilon
        self.sigma = nn.Parameter(torch.ones(shape.num_heads, 1, shape.head_dim))
        self.projection = Draws(projection, num_features, shape, generator, per_head)

    @property
    def num_outputs(self) -> int:
        return 2 * self.projection.num_rows

    def scaled(self, x: Tensor) -> Tensor:
        """sigma x / (|x| + c) / tau for x [B, H, L, D]: what `kernel` takes."""
        # bounded below: at x = 0 the gradient of a norm is not a number
        norm = x.square().sum(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
        return x / (norm + self.norm_epsilon) * (self.sigma / self.temperature)

    def forward(self, x: Tensor, is_query: bool, prepared: Any = None) -> Features:
        return Features(waves(self.scaled(x), self.projection(), self.projection.amplitudes(is_query)))

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return characteristic(self.law, x - y)

    def second_moment(self, x: Tensor, y: Tensor) -> Tensor:
        return (1 + characteristic(self.law, 2 * (x - y))) / 2


def waves(x: Tensor, w: Tensor, amplitude: Tensor | float) -> Tensor:
    """amplitude [cos w.x, sin w.x]: x [B, H, L, D], w [M, D] or [H, M, D] -> [B, H, L, 2M]."""
    angle = x @ w.transpose(-2, -1)
    return torch.cat([angle.cos() * amplitude, angle.sin() * amplitude], dim=-1)


def _half_norms(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(dim=-1) + y.square().sum(dim=-1)) / 2
