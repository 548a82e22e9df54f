"""Owns the contract of a projection: a law over matrices W [F, D], and the module that holds one draw of it."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

RowNorm = Literal["chi", "fixed", "other"]


class ProjectionMatrix(nn.Module):
    """One draw, kept in a persistent buffer: `state_dict` is the whole function. forward() -> W [F, D]."""

    def __init__(self, matrix: Tensor, weights: Tensor | None = None) -> None:
        """`weights` [F]: quadrature weights of the rows, None when all are equal."""
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("weights", weights)

    def forward(self) -> Tensor:
        return self.matrix


class Projection(ABC):
    """A law over W [F, D]. Stateless (a plain node in YAML); `build` draws from the generator alone.

    `gaussian_marginals`: every single row is N(0, I), which unbiased exp and trig features need.
    `row_norm`: "chi" (as a Gaussian row), "fixed" (sqrt(D): biased for exp features, and it makes A inert), "other".
    """

    gaussian_marginals: ClassVar[bool]
    row_norm: ClassVar[RowNorm]
    is_complex: ClassVar[bool] = False
    # why rows cannot be factors of random monomials, which need E[w w'] = I for any number of rows; None: they can
    no_factor: ClassVar[str | None] = None
    paper: ClassVar[str] = "-"  # arXiv id

    @abstractmethod
    def sample(self, num_features: int, head_dim: int, generator: torch.Generator) -> Tensor:
        """W [F, D], float32, on the CPU."""

    def block(self, head_dim: int) -> int:
        """Rows that may depend on each other; 1 means that all rows are independent."""
        raise NotImplementedError(f"{type(self).__name__} has no closed form of what its rows have in common")

    def moment(self, degree: int, x: Tensor, y: Tensor) -> Tensor:
        """E[Re(z(x) conj z(y))^2] of z(x) = prod_{j <= degree} w_j.x, the rows w_j independent; x, y [..., D]."""
        if not self.gaussian_marginals:
            raise NotImplementedError(f"{type(self).__name__} has no closed form of E[(w.x)^2 (w.y)^2]")
        t = (x * y).sum(dim=-1)
        return (x.square().sum(dim=-1) * y.square().sum(dim=-1) + 2 * t**2) ** degree

    def build(self, num_features: int, head_dim: int, generator: torch.Generator) -> ProjectionMatrix:
        """A module whose forward() is W. Learnable laws override this."""
        return ProjectionMatrix(self.sample(num_features, head_dim, generator))
