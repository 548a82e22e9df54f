"""Owns how a feature map holds its projection: which laws it accepts, and one draw for all heads or one per head."""

import math

import torch
from torch import Tensor, nn

from attention.base import HeadShape
from attention.projections.base import Projection


class Draws(nn.Module):
    """forward() -> W [M, D], or [H, M, D] with `per_head`."""

    def __init__(
        self, law: Projection, num_features: int, shape: HeadShape, generator: torch.Generator, per_head: bool
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        self.per_head, self.num_rows = per_head, num_features
        num_draws = shape.num_heads if per_head else 1
        self.heads = nn.ModuleList(law.build(num_features, shape.head_dim, generator) for _ in range(num_draws))
        # Rules of positive weights estimate with positive features; one negative weight costs the positivity.
        self.signed = any(head.weights is not None and bool((head.weights < 0).any()) for head in self.heads)

    def forward(self) -> Tensor:
        return torch.stack([head() for head in self.heads]) if self.per_head else self.heads[0]()

    def amplitudes(self, is_query: bool) -> Tensor | float:
        """Factors whose product over both sides is the weight of a row: 1/sqrt(M), or [M] / [H, 1, M] for quadratures.

        A quadrature weight w gives sqrt(|w|) to both sides and its sign to the keys.
        """
        if self.heads[0].weights is None:
            return 1.0 / math.sqrt(self.num_rows)
        if self.per_head:
            weights = torch.stack([head.weights for head in self.heads])[:, None]
        else:
            weights = self.heads[0].weights
        magnitude = weights.abs().sqrt()
        return magnitude if is_query else magnitude * weights.sign()


def check_rows(law: Projection, allow_biased: bool, needs_chi_norms: bool) -> None:
    """Refuse rows w that are not N(0, I) for maps whose kernel is a Gaussian mean over w.

    Raises:
        ValueError: rows of one norm where `needs_chi_norms`, complex rows; any that are not N(0, I) without
            `allow_biased`.
    """
    name = type(law).__name__
    if law.is_complex:
        raise ValueError(f"{name} has complex rows, which only Maclaurin features use. {_GAUSSIAN_ROWS}")
    if needs_chi_norms and law.row_norm == "fixed":
        raise ValueError(
            f"{name} has rows of one norm: w'Aw would be (nearly) the same for all of them, so that A would do nothing "
            f"but bias the estimate. {_GAUSSIAN_ROWS}, or a_structure=zero."
        )
    if not law.gaussian_marginals and not allow_biased:
        raise ValueError(
            f"{name} has rows that are not N(0, I), so the estimate of the kernel would be biased. {_GAUSSIAN_ROWS}, or "
            "accept it: +attention.feature_map.allow_biased=true."
        )


def check_factors(law: Projection) -> None:
    """Refuse rows that cannot be the factors of random monomials: these need E[w w'] = I for any number of rows."""
    if law.no_factor is not None:
        raise ValueError(
            f"{type(law).__name__} cannot give the factors of Maclaurin features: {law.no_factor}. Use "
            "projection@attention.feature_map.projection=rademacher, srht, haar, gaussian, orf, sorf, rom, scrf, "
            "fastfood_fixed, qmc or sgq."
        )


_GAUSSIAN_ROWS = (
    "Use Gaussian rows (projection@attention.feature_map.projection=gaussian, orf with norms=chi, scrf, fastfood_fixed "
    "or qmc)"
)
