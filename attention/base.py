"""Owns the contract of the attention slot: HeadShape, Attention, and the mask convention.

Legend used in every tensor file: B batch, H heads, L length, D head_dim, F num_features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadShape:
    """What a mechanism may know of the model around it."""

    num_heads: int
    head_dim: int
    max_len: int


@dataclass(frozen=True)
class Description:
    """One row of the catalogue. `complexity` is the time of one forward per head, in L, D, F and own symbols."""

    paper: str  # arXiv id, or "-"
    exact: bool  # True when nothing is approximated: the mechanism computes its own definition
    complexity: str


class Attention(nn.Module, ABC):
    """Mix values over positions: q, k, v [B, H, L, D] -> [B, H, L, D].

    `key_padding_mask` [B, L] is True at padding (PyTorch's convention); None means that every position is real.
    The slot's rules hold for every mechanism (tests/attention/test_contract.py): no operation mixes examples of a
    batch, masked keys have no influence, an example without any real key gives exactly 0, all randomness comes from
    the generator handed to the constructor and lives in buffers. Constructors are called as
    `factory(shape, generator)`; every other argument is keyword-only and comes from conf/attention/.

    Scaling: mechanisms built on the dot product apply 1/sqrt(D) exactly once, in `mix`.
    """

    description: ClassVar[Description]
    # rule of the contract -> why this mechanism cannot satisfy it by its own definition
    exemptions: Mapping[str, str] = {}
    # True when `mix` may run in bf16/fp16; everything else is computed in float32 and cast back
    native_half_precision: ClassVar[bool] = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """q, k, v [B, H, L, D]; key_padding_mask [B, L] bool or None -> [B, H, L, D] in v's dtype."""
        _check_shapes(q, k, v, key_padding_mask)
        dtype = v.dtype
        if dtype in (torch.bfloat16, torch.float16) and not self.native_half_precision:
            q, k, v = q.float(), k.float(), v.float()
        if key_padding_mask is None:
            return self.mix(q, k, v, None).to(dtype)
        # An example without real keys is computed as if it had them all and then set to 0: so no mechanism divides
        # by an empty sum, and no NaN reaches a gradient.
        empty = key_padding_mask.all(dim=-1)
        out = self.mix(q, k, v, key_padding_mask & ~empty[:, None])
        return out.masked_fill(empty[:, None, None, None], 0.0).to(dtype)

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """As `forward`, with at least one real key in every example and float32 (or float64) inputs."""


AttentionFactory = Callable[[HeadShape, torch.Generator], Attention]


def mask_keys(features: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Set the rows [B, H, L, F] of padded keys to 0. Apply it to phi(k), never to k: phi(0) is not 0."""
    if key_padding_mask is None:
        return features
    return features.masked_fill(key_padding_mask[:, None, :, None], 0.0)


def count_keys(k: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Number of real keys of each example, [B, 1, 1, 1], in k's dtype."""
    if key_padding_mask is None:
        return k.new_full((k.shape[0], 1, 1, 1), k.shape[2])
    return (~key_padding_mask).sum(dim=-1).to(k.dtype)[:, None, None, None]


def mean_over_keys(x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Mean of x [B, H, L, D] over real positions -> [B, H, 1, D]."""
    return mask_keys(x, key_padding_mask).sum(dim=2, keepdim=True) / count_keys(x, key_padding_mask)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> None:
    if q.dim() != 4 or k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention needs q, k, v of shape [B, H, L, D] that agree in B, H and D; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if key_padding_mask is not None and (
        key_padding_mask.shape != (k.shape[0], k.shape[2]) or key_padding_mask.dtype != torch.bool
    ):
        raise ValueError(
            f"key_padding_mask must be bool of shape [B, L] = {(k.shape[0], k.shape[2])}, True at padding; "
            f"got {key_padding_mask.dtype} {tuple(key_padding_mask.shape)}"
        )
