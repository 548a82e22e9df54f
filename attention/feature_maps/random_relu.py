"""Owns the rectified random features of the Performer's generalised attention.

Legend: B batch, H heads, L length, D head_dim, F num_features.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from attention.base import Description, HeadShape
from attention.feature_maps.base import FeatureMap, Features, Sign
from attention.projections.base import Projection
from attention.projections.draws import Draws, check_rows


class RandomRelu(FeatureMap):
    """phi(x) = (relu(W x) + c) / sqrt(F) on x = q D^(-1/4): the Performer-ReLU (2009.14794).

    With Gaussian rows of W this estimates an arc-cosine kernel, not softmax: c^2 + c (|x| + |y|) / sqrt(2 pi) plus
    |x| |y| (sin a + (pi - a) cos a) / (2 pi), a the angle between x and y. c > 0 keeps every weight positive.
    """

    sign: ClassVar[Sign] = "positive"
    description = Description(paper="2009.14794", exact=False, complexity="L F D")

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        num_features: int,
        projection: Projection,
        offset: float,
        per_head: bool = False,
        allow_biased: bool = False,
    ) -> None:
        """`offset`: c, added to every feature."""
        super().__init__()
        if offset <= 0:
            raise ValueError(f"RandomRelu needs offset > 0, or a query's weights may all be 0; got {offset}")
        check_rows(projection, allow_biased, needs_chi_norms=False)
        self.law, self.scale, self.offset = projection, shape.head_dim**-0.25, offset
        self.projection = Draws(projection, num_features, shape, generator, per_head)
        if self.projection.signed:
            self.sign = "signed"

    @property
    def num_outputs(self) -> int:
        return self.projection.num_rows

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale

    def forward(self, x: Tensor, is_query: bool, prepared: Any = None) -> Features:
        projected = self.scaled(x) @ self.projection().transpose(-2, -1)  # [B, H, L, F]
        return Features((projected.relu() + self.offset) * self.projection.amplitudes(is_query))

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        self._check_closed_form()
        c, norm_x, norm_y, cosine = self.offset, *_polar(x, y)
        return c * c + c * (norm_x + norm_y) * _HALF_MEAN + norm_x * norm_y * _arc_cosine(cosine)

    def second_moment(self, x: Tensor, y: Tensor) -> Tensor:
        """E[(a + c)^2 (b + c)^2] for a = relu(w.x), b = relu(w.y) and a Gaussian row w, term by term."""
        self._check_closed_form()
        c, norm_x, norm_y, cosine = self.offset, *_polar(x, y)
        angle = torch.arccos(cosine)
        # E[a^2 b^2] of unit vectors: the arc-cosine kernel of order 2 (Cho and Saul 2009), over 2
        fourth = (3 * angle.sin() * cosine + (math.pi - angle) * (1 + 2 * cosine**2)) / (2 * math.pi)
        third = (1 + cosine) ** 2 * _HALF_MEAN / 2  # E[a^2 b] = E[a b^2] of unit vectors
        product = norm_x * norm_y
        total = fourth * product**2 + 2 * c * third * product * (norm_x + norm_y)
        total = total + c**2 * ((norm_x**2 + norm_y**2) / 2 + 4 * product * _arc_cosine(cosine))
        return total + 2 * c**3 * _HALF_MEAN * (norm_x + norm_y) + c**4

    def _check_closed_form(self) -> None:
        if not self.law.gaussian_marginals:
            raise NotImplementedError(f"rectified rows of {type(self.law).__name__} have no closed-form mean")


_HALF_MEAN = 1 / math.sqrt(2 * math.pi)  # E[relu(w)] of a standard Gaussian w


def _polar(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|x|, |y| and the cosine of their angle, for x, y [..., D]."""
    norm_x, norm_y = x.norm(dim=-1), y.norm(dim=-1)
    product = (norm_x * norm_y).clamp_min(torch.finfo(x.dtype).tiny)
    return norm_x, norm_y, ((x * y).sum(dim=-1) / product).clamp(-1.0, 1.0)


def _arc_cosine(cosine: Tensor) -> Tensor:
    """E[relu(w.x) relu(w.y)] of unit vectors: half the arc-cosine kernel of order 1."""
    angle = torch.arccos(cosine)
    return (angle.sin() + (math.pi - angle) * cosine) / (2 * math.pi)
