"""Owns the feature maps with nothing random in them: elu+1, cosine-reweighted relu, Taylor, ReBased, Hedgehog.

Legend: B batch, H heads, L length, D head_dim, F num_outputs.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.base import Description, HeadShape
from attention.feature_maps.base import FeatureMap, Features, Sign
from attention.feature_maps.symmetric_square import num_pairs, symmetric_square


class EluPlusOne(FeatureMap):
    """phi(x) = elu(x) + 1 > 0 on unscaled q and k (2006.16236). F = D; the paper scales neither."""

    sign: ClassVar[Sign] = "positive"
    random: ClassVar[bool] = False
    description = Description(paper="2006.16236", exact=True, complexity="L D^2")

    def __init__(self, shape: HeadShape, generator: torch.Generator) -> None:
        super().__init__()
        self._num_outputs = shape.head_dim

    @property
    def num_outputs(self) -> int:
        return self._num_outputs

    def forward(self, x: Tensor, is_query: bool, prepared: Any = None) -> Features:
        # exp for x < 0 and x + 1 above: elu(x) + 1 would round to exactly 0 below -17 in float32.
        return Features(torch.where(x > 0, x + 1, x.clamp(max=0).exp()))

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        return ((functional.elu(x) + 1) * (functional.elu(y) + 1)).sum(dim=-1)


class CosineRelu(FeatureMap):
    """phi(x_i) = [relu(x_i) cos a_i, relu(x_i) sin a_i], a_i = pi i / (2 M): cosFormer (2202.08791).

    The weights are relu(q_i).relu(k_j) cos(a_i - a_j), and they are >= 0 because all angles differ by less than pi/2.
    F = 2 D, q and k unscaled. M = max_len and not the padded length of the batch, so that an example's output does not
    depend on its padding. A query without a positive coordinate has no weight at all and gives 0.
    """

    sign: ClassVar[Sign] = "positive"
    random: ClassVar[bool] = False
    description = Description(paper="2202.08791", exact=True, complexity="L D^2")
    exemptions = {"U5": "the weights depend on the distance of the two positions"}

    def __init__(self, shape: HeadShape, generator: torch.Generator) -> None:
        super().__init__()
        self.max_len, self._num_outputs = shape.max_len, 2 * shape.head_dim

    @property
    def num_outputs(self) -> int:
        return self._num_outputs

    def forward(self, x: Tensor, is_query: bool, prepared: Any = None) -> Features:
        length = x.shape[2]
        if length > self.max_len:
            raise ValueError(f"cosFormer is built for max_len={self.max_len} and got {length} positions; raise max_len")
        # Positions from 0 instead of the paper's 1: only differences matter, and the last cosine stays positive.
        angle = torch.arange(length, dtype=x.dtype, device=x.device)[:, None] * (math.pi / (2 * self.max_len))
        rectified = x.relu()
        return Features(torch.cat([rectified * angle.cos(), rectified * angle.sin()], dim=-1))


class Taylor(FeatureMap):
    """phi(x).phi(y) = 1 + t + t^2 / 2, t = q.k / sqrt(D): softmax's exponential to second order.

    Based (2402.18668, 2312.04927). F = 1 + D + D (D + 1) / 2. The features are signed but every weight is at least 1/2.
    The papers project q and k to 16 dimensions first to bound F; that projection lies outside the slot.
    """

    sign: ClassVar[Sign] = "positive_weights"
    random: ClassVar[bool] = False
    description = Description(paper="2402.18668", exact=True, complexity="L D^3")

    def __init__(self, shape: HeadShape, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = shape.head_dim**-0.25
        self._num_outputs = 1 + shape.head_dim + num_pairs(shape.head_dim)

    @property
    def num_outputs(self) -> int:
        return self._num_outputs

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale

    def forward(self, x: Tensor, is_query: bool, prepared: Any = None) -> Features:
        x = self.scaled(x)
        return Features(torch.cat([torch.ones_like(x[..., :1]), x, symmetric_square(x, math.sqrt(0.5))], dim=-1))

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        t = (x * y).sum(dim=-1)
        return 1 + t + t * t / 2


class Rebased(FeatureMap):
    """phi(x).phi(y) = (x'.y')^2 / D with x' = gamma norm(x) + beta, norm a LayerNorm without affine.

    ReBased (2402.10644). gamma, beta [H, D] are learned, apart for queries and keys, from 1 and 0. No other scaling:
    with a `sum` normaliser the factor 1/D cancels. F = D (D + 1) / 2.
    """

    sign: ClassVar[Sign] = "positive_weights"
    random: ClassVar[bool] = False
    description = Description(paper="2402.10644", exact=True, complexity="L D^3")

    def __init__(self, shape: HeadShape, generator: torch.Generator) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.gamma = nn.Parameter(torch.ones(2, shape.num_heads, 1, shape.head_dim))
        self.beta = nn.Parameter(torch.zeros(2, shape.num_heads, 1, shape.head_dim))

    @property
    def num_outputs(self) -> int:
        return num_pairs(self.head_dim)

    def forward(self, x: Tensor, is_query: bool, prepared: Any = None) -> Features:
        side = 0 if is_query else 1
        shaped = functional.layer_norm(x, (self.head_dim,)) * self.gamma[side] + self.beta[side]  # [B, H, L, D]
        return Features(symmetric_square(shaped, self.head_dim**-0.5))


class Hedgehog(FeatureMap):
    """phi(x) = softmax or exp of [y, -y], y = W x + b, learned per head and apart for queries and keys (2402.04347).

    W starts at the identity and b at 0. F = 2 D, always positive. No 1/sqrt(D): W learns the temperature.
    """

    sign: ClassVar[Sign] = "positive"
    random: ClassVar[bool] = False
    description = Description(paper="2402.04347", exact=True, complexity="L D^2")

    def __init__(
        self, shape: HeadShape, generator: torch.Generator, *, activation: Literal["softmax", "exp"], share_map: bool
    ) -> None:
        """`activation`: softmax over the 2 D features of a token, or their plain exponentials.
        `share_map`: one map for queries and keys instead of two."""
        super().__init__()
        if activation not in ("softmax", "exp"):
            raise ValueError(f"Hedgehog's activation must be softmax or exp, got {activation!r}")
        self.activation, self.head_dim = activation, shape.head_dim
        num_maps = 1 if share_map else 2
        identity = torch.eye(shape.head_dim).repeat(num_maps, shape.num_heads, 1, 1)
        self.weight = nn.Parameter(identity)  # [2 or 1, H, D, D]
        self.bias = nn.Parameter(torch.zeros(num_maps, shape.num_heads, 1, shape.head_dim))

    @property
    def num_outputs(self) -> int:
        return 2 * self.head_dim

    def forward(self, x: Tensor, is_query: bool, prepared: Any = None) -> Features:
        side = 0 if is_query else -1  # one map serves both sides, two are ordered query, key
        y = x @ self.weight[side].transpose(-2, -1) + self.bias[side]  # [B, H, L, D]
        logits = torch.cat([y, -y], dim=-1)
        if self.activation == "exp":
            return Features(None, logits)  # the shared stabiliser exponentiates without overflow
        return Features(logits.softmax(dim=-1))
