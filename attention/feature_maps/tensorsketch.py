"""Owns TensorSketch: unbiased features of the polynomial kernel (t + c)^p by count sketches and the FFT.

Legend: B batch, H heads, L length, D head_dim, F num_features.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from attention.base import Description, HeadShape
from attention.feature_maps.base import FeatureMap, Features, Sign


class TensorSketch(FeatureMap):
    """E[phi(x).phi(y)] = (x.y + c)^p (Pham and Pagh, KDD 2013).

    x~ = [x, sqrt(c)]; p independent count sketches C_l(x~) [F], each coordinate added with a random sign to a random
    bucket; phi(x) is their circular convolution, i.e. the inverse FFT of the product of their FFTs. With `unit_norm`
    x is q / |q| and t the cosine, which bounds the kernel; otherwise x = q D^(-1/4). Estimates are signed.

    Buckets and signs are fully independent, which makes the variance of all F features exact in `variance`.
    """

    sign: ClassVar[Sign] = "signed"
    description = Description(paper="-", exact=False, complexity="L F (p D + p log F + D)")

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        degree: int,
        offset: float,
        num_features: int,
        unit_norm: bool,
    ) -> None:
        """`degree`: p >= 1. `offset`: c >= 0. `unit_norm`: divide every query and key by its norm."""
        super().__init__()
        if degree < 1 or offset < 0:
            raise ValueError(f"TensorSketch needs degree >= 1 and offset >= 0; got {degree} and {offset}")
        self.degree, self.offset, self.unit_norm = degree, offset, unit_norm
        self._num_features, self.scale = num_features, shape.head_dim**-0.25
        shape_of_draws = (degree, shape.head_dim + 1)
        buckets = torch.randint(num_features, shape_of_draws, generator=generator)
        signs = 1.0 - 2.0 * torch.randint(2, shape_of_draws, generator=generator)
        # C_l as a matrix with one +-1 per row: on a GPU a small product is faster than a scatter, and deterministic
        sketches = functional.one_hot(buckets, num_features) * signs.unsqueeze(-1)
        self.register_buffer("sketches", sketches)  # [p, D + 1, F]

    @property
    def num_outputs(self) -> int:
        return self._num_features

    def scaled(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1, eps=1e-6) if self.unit_norm else x * self.scale

    def forward(self, x: Tensor, is_query: bool, prepared: Any = None) -> Features:
        x = self.scaled(x)
        x = torch.cat([x, torch.full_like(x[..., :1], self.offset**0.5)], dim=-1)  # [B, H, L, D + 1]
        product = torch.fft.rfft(x @ self.sketches[0])  # [B, H, L, F // 2 + 1]
        for sketch in self.sketches[1:]:
            product = product * torch.fft.rfft(x @ sketch)
        return Features(torch.fft.irfft(product, n=self._num_features))

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return ((x * y).sum(dim=-1) + self.offset) ** self.degree

    def second_moment(self, x: Tensor, y: Tensor) -> Tensor:
        """That of a sketch with a single bucket, a product of p Rademacher projections."""
        return self._extended_moments(x, y)[-1] ** self.degree

    def variance(self, x: Tensor, y: Tensor) -> Tensor:
        """Var[phi(x).phi(y)] over all draws of the F features, x, y [..., D], exactly.

        In the frequency domain phi(x).phi(y) is the mean over w of prod_l X_l(w) conj(Y_l(w)). The moment
        E[X(w) conj(Y(w)) X(w') conj(Y(w'))] of one sketch takes four values, as w' is -w, w, both or neither.
        """
        t, square, both_norms, rho = self._extended_moments(x, y)
        p, f = self.degree, self._num_features
        self_conjugate = 2 - f % 2  # the frequencies with w = -w
        other = f - self_conjugate
        total = (f * f - 2 * f + self_conjugate) * t ** (2 * p)
        total = total + other * (both_norms**p + square**p) + self_conjugate * rho**p
        return total / f**2 - t ** (2 * p)

    def _extended_moments(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t, 2 t^2 - s, t^2 + n - s, 2 t^2 + n - 2 s with s = sum x_c^2 y_c^2, n = |x|^2 |y|^2, all offset included."""
        t = (x * y).sum(dim=-1) + self.offset
        norms = (x.square().sum(dim=-1) + self.offset) * (y.square().sum(dim=-1) + self.offset)
        shared = (x.square() * y.square()).sum(dim=-1) + self.offset**2
        return t, 2 * t * t - shared, t * t + norms - shared, 2 * t * t + norms - 2 * shared
