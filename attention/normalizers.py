"""Owns the division by the normaliser: one policy enum for every linear and kernel mechanism."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Policy = Literal["sum", "sum_plus", "clamp_min", "abs_clamp", "signed_clamp", "none"]
_POLICIES = ("sum", "sum_plus", "clamp_min", "abs_clamp", "signed_clamp", "none")


@dataclass(frozen=True)
class Normalizer:
    """numerator / g(denominator), with g one of

    sum           max(den, tiny)         positive weights only; tiny guards against underflow to 0
    sum_plus      den + c                a sink of weight c with value 0
    clamp_min     max(den, c)
    abs_clamp     max(|den|, c)
    signed_clamp  sign(den) max(|den|, c)
    none          1

    With `per_key`, c is multiplied by the number of real keys, which makes it independent of the length.
    """

    policy: Policy
    constant: float = 0.0
    per_key: bool = False

    def __post_init__(self) -> None:
        if self.policy not in _POLICIES:
            raise ValueError(f"unknown normalizer policy {self.policy!r}; choose one of {', '.join(_POLICIES)}")

    @property
    def row_stochastic(self) -> bool:
        """True when constant values pass unchanged (up to an inactive clamp)."""
        return self.policy in ("sum", "clamp_min", "signed_clamp") and (self.per_key or self.constant < 1e-3)

    def divide(self, numerator: Tensor, denominator: Tensor, num_keys: Tensor) -> Tensor:
        """numerator [B, H, L, D], denominator [B, H, L, 1], num_keys [B, 1, 1, 1] -> [B, H, L, D]."""
        return numerator if self.policy == "none" else numerator / self.divisor(denominator, num_keys)

    def divisor(self, denominator: Tensor, num_keys: Tensor) -> Tensor:
        """g(denominator), elementwise; num_keys broadcasts against it."""
        if self.policy == "none":
            return torch.ones_like(denominator)
        if self.policy == "sum":
            return denominator.clamp_min(torch.finfo(denominator.dtype).tiny)
        constant = num_keys * self.constant if self.per_key else self.constant
        if self.policy == "sum_plus":
            return denominator + constant
        if self.policy == "clamp_min":
            return _at_least(denominator, constant)
        magnitude = _at_least(denominator.abs(), constant)
        if self.policy == "abs_clamp":
            return magnitude
        sign = torch.where(denominator < 0, -1.0, 1.0).to(denominator.dtype)
        return sign * magnitude


def _at_least(x: Tensor, bound: Tensor | float) -> Tensor:
    return torch.maximum(x, bound) if isinstance(bound, Tensor) else x.clamp_min(bound)
