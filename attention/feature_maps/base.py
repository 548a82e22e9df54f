"""Owns the contract of a feature map: what it returns, what it declares, and its closed forms."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from attention.base import Description, HeadShape
from attention.normalizers import Normalizer

Sign = Literal["positive", "positive_weights", "signed"]


class Features(NamedTuple):
    """phi(x) = values * exp(logits), either part may be None (meaning 1).

    values: [B, H, L, F]. logits: [B, H, L, F], or [B, H, L, 1] for a factor common to all features of a token.
    Maps of the exponential family return logits, so that one shared stabiliser (`attention.linear.stabilize`) can
    turn them into features without overflow.
    """

    values: Tensor | None
    logits: Tensor | None = None


class FeatureMap(nn.Module, ABC):
    """phi(x) for x [B, H, L, D]. Maps receive *raw* q and k and state their own scaling (`scale`).

    `sign`: "positive" features are >= 0; "positive_weights" may be signed but phi(q).phi(k) >= 0 always;
    "signed" estimates may be negative, so they need a normaliser that survives that.
    Random maps implement `kernel` and `second_moment`, the closed forms of the mean and of the raw second moment of a
    *single-feature* estimate, so that one statistical test covers all of them.
    """

    sign: ClassVar[Sign]
    random: ClassVar[bool] = True
    description: ClassVar[Description]

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """F: the width of phi(x)."""

    def prepare(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> Any:
        """Data-dependent parameters (no gradient), handed to both calls of `forward`. None when there are none."""
        return None

    @abstractmethod
    def forward(self, x: Tensor, is_query: bool, prepared: Any = None) -> Features:
        """x [B, H, L, D] -> Features of width F."""

    def fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        normalizer: Normalizer,
        num_keys: Tensor,
    ) -> Tensor | None:
        """Linear attention over this map as one op that stores no features, [B, H, L, D]; None where there is none."""
        return None

    def scaled(self, x: Tensor) -> Tensor:
        """q or k [B, H, L, D] as `kernel` and `second_moment` take them: after the map's own scaling or norm."""
        return x

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """E[phi(x).phi(y)] for x, y [..., D] that are `scaled`: the kernel that is estimated."""
        raise NotImplementedError(f"{type(self).__name__} has no closed-form kernel")

    def second_moment(self, x: Tensor, y: Tensor) -> Tensor:
        """E[z(x)^2 z(y)^2] of one random feature z, on the same scaled inputs as `kernel`."""
        raise NotImplementedError(f"{type(self).__name__} has no closed-form second moment")


FeatureMapFactory = Callable[[HeadShape, torch.Generator], FeatureMap]
