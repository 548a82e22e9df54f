"""Owns the dot-product kernels K(t) = sum_n a_n t^n, a_n >= 0: closed forms, Maclaurin coefficients and domains.

SchoenbAt, arXiv 2505.12252; that a_n >= 0 makes K positive definite in every dimension is Schoenberg (1942).
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Kernel(ABC):
    """K(t) for |t| < radius. Stateless: one object may serve every layer."""

    radius: ClassVar[float]
    multiplicative: ClassVar[bool] = False  # K(t0 + s) = K(t0) K(s): in a ratio, the series about t0 is that about 0

    @abstractmethod
    def exact(self, t: Tensor) -> Tensor:
        """K(t), elementwise, any shape; meaningless (NaN, wrong sign) outside of the domain: see `check_domain`."""

    def exact_(self, t: Tensor) -> Tensor:
        """K(t) written over t, for blocks whose arguments are needed no more."""
        return t.copy_(self.exact(t))

    @abstractmethod
    def coefficient(self, n: int) -> float:
        """a_n = K^(n)(0) / n!, correctly rounded for every n >= 0."""

    def series(self, t: Tensor, degrees: range | list[int]) -> Tensor:
        """sum of a_n t^n over the given degrees."""
        total = torch.zeros_like(t)
        for n in degrees:
            total = total + self.coefficient(n) * t**n
        return total

    def recentre(self, t0: Tensor) -> tuple[Tensor, Tensor]:
        """u, c with K(t0 + s) proportional in s to c + sum_{n>=1} a_n (s/u)^n: the series about t0 instead of 0."""
        raise ValueError(f"{type(self).__name__} cannot be expanded about another point; set feature_map.centred=false")

    def check_bound(self, bound: float) -> None:
        """Raise ValueError unless |t| <= bound < radius."""
        if bound >= self.radius:
            raise ValueError(
                f"{type(self).__name__}: its argument may reach |t| = {bound:.4g}, but K(t) is defined for "
                f"|t| < {self.radius:g} only. Lower the temperature (temperature.value or temperature.max_argument), "
                "or bound the inputs with a pre-SBN (pre=TokenPreSBN)."
            )

    def check_domain(self, t: Tensor) -> None:
        """Raise ValueError unless every |t| < radius (one device synchronisation)."""
        if math.isfinite(self.radius) and t.numel():
            self.check_bound(t.detach().abs().max().item())


class Exp(Kernel):
    """e^t: a_n = 1/n!."""

    radius = math.inf
    multiplicative = True

    def exact(self, t: Tensor) -> Tensor:
        return t.exp()

    def exact_(self, t: Tensor) -> Tensor:
        return t.exp_()

    def coefficient(self, n: int) -> float:
        return 1 / math.factorial(n)

    def recentre(self, t0: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t0), torch.ones_like(t0)  # e^(t0+s) = e^t0 e^s


class Trigh(Exp):
    """sinh t + cosh t: the same function as e^t, bit for bit. Kept because the paper lists it as a fifth kernel."""


class Inverse(Kernel):
    """1/(1-t): a_n = 1."""

    radius = 1.0

    def exact(self, t: Tensor) -> Tensor:
        return 1 / (1 - t)

    def exact_(self, t: Tensor) -> Tensor:
        return t.neg_().add_(1).reciprocal_()

    def coefficient(self, n: int) -> float:
        return 1.0

    def recentre(self, t0: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t0, torch.ones_like(t0)


class Log(Kernel):
    """1 - ln(1-t): a_0 = 1, a_n = 1/n."""

    radius = 1.0

    def exact(self, t: Tensor) -> Tensor:
        return 1 - torch.log1p(-t)

    def exact_(self, t: Tensor) -> Tensor:
        return t.neg_().log1p_().neg_().add_(1)

    def coefficient(self, n: int) -> float:
        return 1 / max(n, 1)

    def recentre(self, t0: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t0, 1 - torch.log1p(-t0)


class Sqrt(Kernel):
    """2 - sqrt(1-t): a_0 = 1, a_n = C(2n, n) / (4^n (2n-1))."""

    radius = 1.0  # K(1) = 2 exists, its slope does not

    def exact(self, t: Tensor) -> Tensor:
        return 2 - (1 - t).sqrt()

    def exact_(self, t: Tensor) -> Tensor:
        return t.neg_().add_(1).sqrt_().neg_().add_(2)

    def coefficient(self, n: int) -> float:
        return math.comb(2 * n, n) / (4**n * (2 * n - 1)) if n else 1.0

    def recentre(self, t0: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t0, 2 * (1 - t0).rsqrt() - 1
